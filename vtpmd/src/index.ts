export * from './engine/command.js';
export * from './engine/engine.js';
export * from './engine/start.js';
export * from './error.js';
