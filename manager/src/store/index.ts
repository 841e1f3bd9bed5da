export {
  adoptStore,
  entriesOf,
  examineStore,
  overwrite,
  readAnchor,
  type StoreVerdict,
  spoilAnchor,
} from './adopt.js';
export { ANCHOR_KEY, statedUnverified } from './anchor.js';
export {
  type AnchoredStore,
  type AnchorOptions,
  type AnchorState,
  type Counting,
  createAnchoredStore,
  openAnchoredStore,
} from './anchored-store.js';
export { MAX_VALUE_BYTES } from './limits.js';
export { openLmdbStore, withLmdbStore } from './lmdb-store.js';
export { buildMerkleTree, type LeafChange, valueDigest } from './merkle-tree.js';
export type { StateStore, StoreEntry, StoreWrite } from './state-store.js';
