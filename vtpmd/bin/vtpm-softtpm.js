#!/usr/bin/env node
import '../dist/program/vtpm-softtpm.js';
