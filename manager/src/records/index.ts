export * from './format.js';
export * from './key.js';
export * from './restored.js';
export * from './transitions.js';
