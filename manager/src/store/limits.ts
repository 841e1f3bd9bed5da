/** Bytes of one value. A vTPM with every NV index in use stays far below. */
export const MAX_VALUE_BYTES = 4 * 1024 * 1024;

/** Bytes of the values of a commit, unless it has a single write. */
export const MAX_BATCH_BYTES = 8 * 1024 * 1024;

/** Writes of a commit, without the anchor. */
export const MAX_BATCH_WRITES = 256;

// LMDB takes more; ASCII without spaces has the same order as bytes and as a JavaScript string.
const KEY = /^[\x21-\x7e]{1,128}$/;

export function isStoreKey(key: unknown): key is string {
  return typeof key === 'string' && KEY.test(key);
}
