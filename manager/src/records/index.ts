export * from './format.js';
export * from './restored.js';
export * from './transitions.js';
