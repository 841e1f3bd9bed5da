export * from './bytes.js';
export * from './codec.js';
export * from './error.js';
export * from './generated/messages.js';
export * from './grpc-wire.js';
export * from './identity.js';
export * from './load-box.js';
export * from './session.js';
