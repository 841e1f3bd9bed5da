import { randomBytes } from 'node:crypto';
import { expectLength } from 'vtpm-proto';
import { ManagerError } from '../error.js';
import { aeadOpen, aeadSeal, NONCE_BYTES, TAG_BYTES } from './aead.js';
import { secretBuffer } from './secret.js';

/** What a wrapped data key is bound to. */
export interface DataKeyNames {
  /** Format number of the record. */
  readonly format: number;
  readonly keyId: number;
  /** 16 bytes */
  readonly storeId: Uint8Array;
  /** 16 bytes */
  readonly vtpmUuid: Uint8Array;
}

const KEY_BYTES = 32;
/** 12-byte nonce, 32-byte key, 16-byte tag. */
export const WRAPPED_KEY_BYTES = NONCE_BYTES + KEY_BYTES + TAG_BYTES;

/** The random key of one vTPM, 32 bytes. The caller wipes it. */
export function newDataKey(): Buffer {
  const key = secretBuffer(KEY_BYTES);
  const random = randomBytes(KEY_BYTES);
  key.set(random);
  random.fill(0);
  return key;
}

export function wrapDataKey(storeKey: Uint8Array, dataKey: Uint8Array, names: DataKeyNames): Buffer {
  expectLength('data key', dataKey, KEY_BYTES);
  const { nonce, sealed } = aeadSeal(storeKey, associatedData(names), dataKey);
  return Buffer.concat([nonce, sealed]);
}

/** @throws ManagerError `store-corrupt` where the key was wrapped for another record, store or key id, or changed */
export function unwrapDataKey(storeKey: Uint8Array, wrapped: Uint8Array, names: DataKeyNames): Buffer {
  if (wrapped.length !== WRAPPED_KEY_BYTES) {
    throw new ManagerError('store-corrupt', `a wrapped data key has ${wrapped.length} bytes`);
  }
  return aeadOpen(
    storeKey,
    associatedData(names),
    { nonce: wrapped.subarray(0, NONCE_BYTES), sealed: wrapped.subarray(NONCE_BYTES) },
    'a wrapped data key',
  );
}

/** "vtpm.v1 data key", format and key id (u32, big-endian), store id, uuid. */
function associatedData({ format, keyId, storeId, vtpmUuid }: DataKeyNames): Buffer {
  expectLength('store id', storeId, 16);
  expectLength('vTPM uuid', vtpmUuid, 16);
  const numbers = Buffer.alloc(8);
  numbers.writeUInt32BE(format, 0);
  numbers.writeUInt32BE(keyId, 4);
  return Buffer.concat([Buffer.from('vtpm.v1 data key'), numbers, storeId, vtpmUuid]);
}
