import { hkdfSync, randomFillSync } from 'node:crypto';
import { concat, readRandom, type Session, type Tpm, wipe } from 'tpm2-ts-bindings';
import { ManagerError } from '../error.js';
import { SECRET_BYTES } from './enrolment.js';

/** The root key from its two halves, 32 bytes. Overwriting the NV half makes every key before it unreachable. */
export function deriveRootKey(rootSecret: Uint8Array, nvHalf: Uint8Array, installation: Uint8Array): Buffer {
  const inputs = concat(rootSecret, nvHalf);
  try {
    return rootKeyFromInputs(inputs, installation);
  } finally {
    wipe(inputs);
  }
}

/**
 * The root key from what was boxed to the recovery key, 32 bytes; the caller wipes both.
 * @param inputs sealed secret and NV half, 64 bytes
 * @param installation 16 bytes
 * @throws ManagerError `bad-request`
 */
export function rootKeyFromInputs(inputs: Uint8Array, installation: Uint8Array): Buffer {
  if (inputs.length !== 2 * SECRET_BYTES || installation.length !== 16) {
    throw new ManagerError('bad-request', 'the inputs of a root key have 64 bytes, an installation id 16');
  }
  return Buffer.from(hkdfSync('sha256', inputs, installation, 'vtpm root key v1', SECRET_BYTES));
}

/** 32 bytes from the TPM's random generator and this host's: unpredictable while one of the two is. */
export async function mixedRandom(tpm: Tpm, session: Session): Promise<Buffer> {
  const theirs = await readRandom(tpm, SECRET_BYTES, [session]);
  const ours = randomFillSync(Buffer.alloc(SECRET_BYTES));
  const input = concat(theirs, ours);
  try {
    return Buffer.from(hkdfSync('sha256', input, Buffer.alloc(0), 'vtpm root secret v1', SECRET_BYTES));
  } finally {
    wipe(theirs, ours, input);
  }
}
