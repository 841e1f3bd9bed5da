export * from './data-key.js';
export * from './envelope.js';
export * from './hierarchy.js';
export * from './keyring.js';
export * from './part-seal.js';
export * from './root-keys.js';
export * from './secret.js';
