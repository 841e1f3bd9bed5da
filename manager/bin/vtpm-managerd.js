#!/usr/bin/env node
import '../dist/program/vtpm-managerd.js';
