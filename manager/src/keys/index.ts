export * from './data-key.js';
export * from './hierarchy.js';
export * from './part-seal.js';
export * from './secret.js';
