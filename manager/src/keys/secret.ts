import { createHmac } from 'node:crypto';

/** Zeroed memory of its own, never a slice of Node's shared pool: wiping it leaves no copy behind. */
export function secretBuffer(length: number): Buffer {
  return Buffer.alloc(length);
}

/** Overwrites secrets that are no longer needed. */
export function wipe(...secrets: readonly (Uint8Array | undefined)[]): void {
  for (const secret of secrets) secret?.fill(0);
}

const FIRST_BLOCK = Buffer.from([1]);

/**
 * HKDF-SHA256 (RFC 5869), 32 bytes, in memory of its own. One block is two HMACs; hkdfSync makes key objects for them and
 * takes twice as long, and this is done for each part of each save.
 */
export function hkdf(key: Uint8Array, salt: Uint8Array, info: string | Uint8Array): Buffer {
  const extracted = createHmac('sha256', salt).update(key).digest();
  try {
    return createHmac('sha256', extracted).update(info).update(FIRST_BLOCK).digest();
  } finally {
    wipe(extracted);
  }
}
