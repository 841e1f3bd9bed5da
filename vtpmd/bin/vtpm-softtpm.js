#!/usr/bin/env node
import '../dist/softtpm-main.js';
