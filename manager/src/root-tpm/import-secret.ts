import { concat, leftPad } from 'tpm2-ts-bindings';
import { hkdf } from '../keys/secret.js';

/** Bytes of a coordinate of P-256. */
const COORDINATE_BYTES = 32;
const INFO = Buffer.from('vtpm.v1 import secret\0');

/**
 * What two hosts share after a key agreement with an import key, 32 bytes; the caller wipes it.
 * @param z the x coordinate of the agreement
 * @param point the ephemeral key, TPMS_ECC_POINT
 * @param name of the import key
 */
export function importSecret(z: Uint8Array, point: Uint8Array, name: Uint8Array): Buffer {
  const padded = leftPad(z, COORDINATE_BYTES);
  try {
    return hkdf(padded, name, concat(INFO, point));
  } finally {
    padded.fill(0);
  }
}
