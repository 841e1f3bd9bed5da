export * from './client.js';
export * from './error.js';
export * from './framing.js';
export * from './location.js';
export * from './stdio.js';
