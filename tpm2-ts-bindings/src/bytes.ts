/**
 * Joins byte strings in memory of its own. `Buffer.concat` and `Buffer.from` take small buffers from a pool that the
 * whole process shares, where a secret outlives its `fill(0)` in copies and slices of others.
 */
export function concat(...parts: readonly Uint8Array[]): Buffer {
  const out = Buffer.alloc(parts.reduce((sum, part) => sum + part.length, 0));
  let offset = 0;
  for (const part of parts) {
    out.set(part, offset);
    offset += part.length;
  }
  return out;
}

/** Overwrites with zeros what is defined. */
export function wipe(...parts: readonly (Uint8Array | undefined)[]): void {
  for (const part of parts) part?.fill(0);
}

/** `value` with zero bytes before it to `length` bytes: TPMs may leave leading zeros of a coordinate out. */
export function leftPad(value: Uint8Array, length: number): Buffer {
  if (value.length >= length) return concat(value);
  return concat(new Uint8Array(length - value.length), value);
}

/**
 * An authValue without its trailing zeros, as it enters HMAC keys (Part 1, "Session-Based Authorizations"). Zeros
 * inside belong to it.
 */
export function trimTrailingZeros(value: Uint8Array): Uint8Array {
  let end = value.length;
  while (end > 0 && value[end - 1] === 0) end--;
  return value.subarray(0, end);
}

export function u32Bytes(value: number): Buffer {
  const out = Buffer.alloc(4);
  out.writeUInt32BE(value >>> 0);
  return out;
}

export function u16Bytes(value: number): Buffer {
  const out = Buffer.alloc(2);
  out.writeUInt16BE(value);
  return out;
}
