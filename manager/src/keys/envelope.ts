import { boxKeyPair, ProtoError, x25519 } from 'vtpm-proto';
import { ManagerError } from '../error.js';
import { aeadOpen, aeadSeal, NONCE_BYTES, TAG_BYTES } from './aead.js';
import { hkdf, wipe } from './secret.js';

/**
 * Encryption to a public key whose private half is elsewhere: what only an operator with an offline key opens.
 *
 *     ephemeral X25519 key (32) | nonce (12) | AES-256-GCM ciphertext | tag (16)
 *     key = HKDF-SHA256(X25519 secret, salt = ephemeral key | recipient key, "vtpm.v1 envelope " purpose)
 *
 * The purpose and what else is named are associated data.
 */
const KEY_BYTES = 32;
export const ENVELOPE_OVERHEAD = KEY_BYTES + NONCE_BYTES + TAG_BYTES;

export interface EnvelopeNames {
  readonly purpose: string;
  /** Authenticated with the content, and not in the envelope. */
  readonly associated: Uint8Array;
}

/** @param recipient X25519 public key, 32 bytes */
export function sealEnvelope(recipient: Uint8Array, names: EnvelopeNames, plain: Uint8Array): Buffer {
  const ephemeral = boxKeyPair();
  const key = envelopeKey(ephemeral.secretKey, recipient, ephemeral.publicKey, recipient, names.purpose);
  try {
    const { nonce, sealed } = aeadSeal(key, associatedData(names), plain);
    return Buffer.concat([ephemeral.publicKey, nonce, sealed]);
  } finally {
    wipe(key, ephemeral.secretKey);
  }
}

/**
 * @param secretKey X25519 private key, 32 bytes
 * @returns the plaintext; the caller wipes it
 * @throws ManagerError `bad-request` where it is for another key or purpose, or was changed
 */
export function openEnvelope(secretKey: Uint8Array, names: EnvelopeNames, envelope: Uint8Array): Buffer {
  const refusal = (cause?: unknown): ManagerError =>
    new ManagerError('bad-request', `this ${names.purpose} does not open with this key, or was changed`, {
      cause,
    });
  if (envelope.length < ENVELOPE_OVERHEAD) throw refusal();
  const own = boxKeyPair(secretKey);
  const ephemeral = envelope.subarray(0, KEY_BYTES);
  let key: Buffer | undefined;
  try {
    key = envelopeKey(own.secretKey, ephemeral, ephemeral, own.publicKey, names.purpose);
    const parts = {
      nonce: envelope.subarray(KEY_BYTES, KEY_BYTES + NONCE_BYTES),
      sealed: envelope.subarray(KEY_BYTES + NONCE_BYTES),
    };
    return aeadOpen(key, associatedData(names), parts, names.purpose);
  } catch (error) {
    if (error instanceof ProtoError || error instanceof ManagerError) throw refusal(error);
    throw error;
  } finally {
    wipe(key, own.secretKey);
  }
}

function envelopeKey(
  secretKey: Uint8Array,
  peer: Uint8Array,
  ephemeral: Uint8Array,
  recipient: Uint8Array,
  purpose: string,
): Buffer {
  const shared = x25519(secretKey, peer);
  try {
    return hkdf(shared, Buffer.concat([ephemeral, recipient]), `vtpm.v1 envelope ${purpose}`);
  } finally {
    wipe(shared);
  }
}

function associatedData({ purpose, associated }: EnvelopeNames): Buffer {
  return Buffer.concat([Buffer.from(`${purpose}\0`), associated]);
}
