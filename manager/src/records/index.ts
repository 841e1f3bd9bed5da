export * from './format.js';
export * from './key.js';
export * from './migration.js';
export * from './parts.js';
export * from './restored.js';
export * from './transitions.js';
export * from './travelling.js';
