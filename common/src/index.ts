export * from './barrier.js';
export * from './clock.js';
export * from './config.js';
export * from './files.js';
export * from './libc.js';
export * from './log.js';
export * from './paths.js';
export * from './version.js';
