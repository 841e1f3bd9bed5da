export * from './format.js';
export * from './transitions.js';
