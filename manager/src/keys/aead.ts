import { createCipheriv, createDecipheriv } from 'node:crypto';
import { expectLength, publicRandom } from 'vtpm-proto';
import { ManagerError } from '../error.js';
import { secretBuffer, wipe } from './secret.js';

/** AES-256-GCM (NIST SP 800-38D) with a random 12-byte nonce and a 16-byte tag behind the ciphertext. */
export const NONCE_BYTES = 12;
export const TAG_BYTES = 16;

export function aeadSeal(
  key: Uint8Array,
  associated: Uint8Array,
  plain: Uint8Array,
): { nonce: Buffer; sealed: Buffer } {
  const nonce = publicRandom(NONCE_BYTES);
  const cipher = createCipheriv('aes-256-gcm', key, nonce);
  cipher.setAAD(associated);
  return { nonce, sealed: Buffer.concat([cipher.update(plain), cipher.final(), cipher.getAuthTag()]) };
}

/** @returns the plaintext in memory of its own @throws ManagerError `store-corrupt`, naming `what` */
export function aeadOpen(
  key: Uint8Array,
  associated: Uint8Array,
  { nonce, sealed }: { nonce: Uint8Array; sealed: Uint8Array },
  what: string,
): Buffer {
  expectLength('nonce', nonce, NONCE_BYTES);
  if (sealed.length < TAG_BYTES) throw new ManagerError('store-corrupt', `${what} has no tag`);
  const decipher = createDecipheriv('aes-256-gcm', key, nonce, { authTagLength: TAG_BYTES });
  decipher.setAAD(associated);
  decipher.setAuthTag(sealed.subarray(sealed.length - TAG_BYTES));
  const opened = decipher.update(sealed.subarray(0, sealed.length - TAG_BYTES));
  const plain = secretBuffer(opened.length);
  plain.set(opened);
  wipe(opened);
  try {
    decipher.final();
  } catch (cause) {
    wipe(plain);
    throw new ManagerError('store-corrupt', `${what} does not authenticate: it was changed or moved`, {
      cause,
    });
  }
  return plain;
}
