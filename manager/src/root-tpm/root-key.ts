import { hkdfSync, randomFillSync } from 'node:crypto';
import { concat, readRandom, type Session, type Tpm, wipe } from 'tpm2-ts-bindings';
import { SECRET_BYTES } from './enrolment.js';

/** The root key from its two halves, 32 bytes. Overwriting the NV half makes every key before it unreachable. */
export function deriveRootKey(rootSecret: Uint8Array, nvHalf: Uint8Array, installation: Uint8Array): Buffer {
  const input = concat(rootSecret, nvHalf);
  try {
    return Buffer.from(hkdfSync('sha256', input, installation, 'vtpm root key v1', SECRET_BYTES));
  } finally {
    wipe(input);
  }
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
