import { createPrivateKey, createPublicKey, type KeyObject } from 'node:crypto';
import { expectLength } from './bytes.js';

/**
 * A public key of RFC 8032 or RFC 7748 from its 32 bytes. As a JSON Web Key (RFC 8037): OpenSSL's reader of DER takes ten
 * times as long.
 */
export function rawPublicKey(curve: 'Ed25519' | 'X25519', bytes: Uint8Array): KeyObject {
  expectLength('public key', bytes, 32);
  const x = Buffer.from(bytes.buffer, bytes.byteOffset, bytes.length).toString('base64url');
  return createPublicKey({ key: { kty: 'OKP', crv: curve, x }, format: 'jwk' });
}

// DER prefix of RFC 8410 section 7 for a raw 32-byte key.
const PKCS8_PREFIX = Buffer.from('302e020100300506032b657004220420', 'hex');

/** An Ed25519 private key (RFC 8032) from its seed of 32 bytes. */
export function privateKeyFromSeed(seed: Uint8Array): KeyObject {
  expectLength('Ed25519 seed', seed, 32);
  const pkcs8 = Buffer.concat([PKCS8_PREFIX, seed]);
  try {
    return createPrivateKey({ key: pkcs8, format: 'der', type: 'pkcs8' });
  } finally {
    pkcs8.fill(0);
  }
}

/** The 32 bytes of a key as above, or of the public half of a private one. */
export function rawBytesOf(key: KeyObject): Buffer {
  const publicKey = key.type === 'private' ? createPublicKey(key) : key;
  return publicKey.export({ format: 'der', type: 'spki' }).subarray(SPKI_PREFIX_BYTES);
}

/** What is before the key (RFC 8410 section 4). */
const SPKI_PREFIX_BYTES = 12;
