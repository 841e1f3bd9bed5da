#!/usr/bin/env node
import '../dist/program/vtpmctl.js';
