import { randomFillSync } from 'node:crypto';

const BLOCK_BYTES = 1024;
let block = Buffer.alloc(0);
let used = 0;

/**
 * Random bytes for what is not secret, such as nonces and salts: asking the generator for each costs as much as the
 * encryption of a small message. Every byte is given out once. Not for keys: the result shares its memory with others.
 */
export function publicRandom(length: number): Buffer {
  if (used + length > block.length) {
    // A new one, never refilled: those who hold parts of the old one keep them.
    block = randomFillSync(Buffer.allocUnsafeSlow(Math.max(BLOCK_BYTES, length)));
    used = 0;
  }
  used += length;
  return block.subarray(used - length, used);
}
