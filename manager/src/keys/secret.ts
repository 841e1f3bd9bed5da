import { hkdfSync } from 'node:crypto';

/** Zeroed memory of its own, never a slice of Node's shared pool: wiping it leaves no copy behind. */
export function secretBuffer(length: number): Buffer {
  return Buffer.alloc(length);
}

/** Overwrites secrets that are no longer needed. */
export function wipe(...secrets: readonly (Uint8Array | undefined)[]): void {
  for (const secret of secrets) secret?.fill(0);
}

/** HKDF-SHA256 (RFC 5869), 32 bytes, in memory of its own. */
export function hkdf(key: Uint8Array, salt: Uint8Array, info: string | Uint8Array): Buffer {
  return Buffer.from(hkdfSync('sha256', key, salt, info, 32));
}
