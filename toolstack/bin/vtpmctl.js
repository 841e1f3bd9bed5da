#!/usr/bin/env node
import '../dist/vtpmctl-main.js';
