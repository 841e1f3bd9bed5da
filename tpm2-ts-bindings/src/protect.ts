import { timingSafeEqual } from 'node:crypto';
import { concat, wipe } from './bytes.js';
import { encode, tpm2b } from './codec.js';
import { Alg, type HashInfo } from './constants.js';
import { cfb, hmac, kdfa, requireHash } from './crypto.js';
import { TpmError } from './error.js';
import type { Public } from './structures.js';
import { Reader } from './wire.js';

/**
 * Encryption and HMAC with keys from one seed, for a Name (Part 1, "Protected Storage"): the form of credential
 * blobs and duplicates. The key it is for says with which algorithms.
 */

const NO_IV = Buffer.alloc(16);
const NOTHING = Buffer.alloc(0);

/** @returns TPM2B of the HMAC, then the encrypted bytes */
export function protect(key: Public, seed: Uint8Array, name: Uint8Array, plain: Uint8Array): Buffer {
  const { hash, symmetric, integrity } = keysOf(key, seed, name);
  try {
    const encrypted = cfb('encrypt', symmetric, NO_IV, plain);
    return concat(encode(tpm2b, hmac(hash, integrity, encrypted, name)), encrypted);
  } finally {
    wipe(symmetric, integrity);
  }
}

/** The plain bytes of `protect`. @throws TpmError `malformed` where they were changed or are for another key or Name */
export function unprotect(key: Public, seed: Uint8Array, name: Uint8Array, wrapped: Uint8Array): Buffer {
  const reader = new Reader(wrapped, 'wrapped object');
  const received = tpm2b.read(reader);
  const encrypted = reader.bytes(reader.left);
  const { hash, symmetric, integrity } = keysOf(key, seed, name);
  try {
    const expected = hmac(hash, integrity, encrypted, name);
    if (received.length !== expected.length || !timingSafeEqual(received, expected)) {
      throw new TpmError('malformed', 'wrapped object: changed, or made for another key or object');
    }
    return cfb('decrypt', symmetric, NO_IV, encrypted);
  } finally {
    wipe(symmetric, integrity);
  }
}

function keysOf(
  key: Public,
  seed: Uint8Array,
  name: Uint8Array,
): { hash: HashInfo; symmetric: Buffer; integrity: Buffer } {
  const hash = requireHash(key.nameAlg);
  const bits = storageKeyBits(key);
  return {
    hash,
    symmetric: kdfa(hash, seed, 'STORAGE', name, NOTHING, bits),
    integrity: kdfa(hash, seed, 'INTEGRITY', NOTHING, NOTHING, hash.size * 8),
  };
}

/** Of the symmetric algorithm that a storage key protects its children with. @throws TpmError `usage` */
function storageKeyBits(key: Public): number {
  if (key.type === Alg.ECC || key.type === Alg.RSA) {
    const { symmetric } = key.parameters;
    if (symmetric.algorithm === Alg.AES && symmetric.mode === Alg.CFB) return symmetric.keyBits;
  }
  throw new TpmError('usage', 'only a storage key with AES in CFB mode can receive this');
}
