import { randomBytes } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { writeFileDurably } from 'vtpm-common';
import { type SigningKey, signingKeyFromSeed } from 'vtpm-proto';
import { ToolstackError } from '../error.js';

const SEED_BYTES = 32;

/**
 * The Ed25519 key that signs this supervisor's tickets; the file holds its 32-byte seed (RFC 8032 section 5.1.5).
 * @returns undefined where there is no file
 * @throws ToolstackError `corrupt`
 */
export function readDelegateKey(path: string): SigningKey | undefined {
  let seed: Buffer;
  try {
    seed = readFileSync(path);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return undefined;
    throw new ToolstackError('corrupt', `${path} cannot be read: ${(error as Error).message}`, {
      cause: error,
    });
  }
  try {
    if (seed.length !== SEED_BYTES) {
      throw new ToolstackError(
        'corrupt',
        `${path} has ${seed.length} bytes, not ${SEED_BYTES}; restore it from a backup`,
      );
    }
    return signingKeyFromSeed(seed);
  } finally {
    seed.fill(0);
  }
}

/** Makes the key of a first start. */
export function createDelegateKey(path: string): SigningKey {
  const seed = randomBytes(SEED_BYTES);
  try {
    writeFileDurably(path, seed, 0o600);
    return signingKeyFromSeed(seed);
  } finally {
    seed.fill(0);
  }
}
