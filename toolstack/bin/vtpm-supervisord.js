#!/usr/bin/env node
import '../dist/supervisor/handover/early-signals.js';

await import('../dist/program/vtpm-supervisord.js');
