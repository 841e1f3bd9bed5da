import { TpmError } from './error.js';

/** Bytes in and out, within bounds. All integers are big-endian. */

/** A structure with the exact bytes it was received as: Names and signatures are over those, not over a copy. */
export interface Embedded<T> {
  readonly bytes: Buffer;
  readonly value: T;
}

/** Most structures and commands fit; zeroing more costs more than growing. */
const FIRST_SIZE = 512;

/** A growing buffer outside Node's pool; `wipe` clears it, outgrown parts are cleared at once. */
export class Writer {
  #buffer = Buffer.alloc(FIRST_SIZE);
  #length = 0;

  #reserve(count: number): number {
    const at = this.#length;
    if (at + count > this.#buffer.length) {
      const old = this.#buffer;
      this.#buffer = Buffer.alloc(Math.max(old.length * 2, at + count));
      this.#buffer.set(old);
      old.fill(0);
    }
    this.#length += count;
    return at;
  }

  unsigned(value: number, size: 1 | 2 | 4): void {
    if (!Number.isInteger(value) || value < 0 || value >= 2 ** (8 * size)) {
      throw new TpmError('usage', `${value} does not fit in ${size} unsigned bytes`);
    }
    const at = this.#reserve(size);
    this.#buffer.writeUIntBE(value, at, size);
  }

  u64(value: bigint): void {
    if (value < 0n || value > 0xffff_ffff_ffff_ffffn)
      throw new TpmError('usage', `${value} does not fit in 64 bits`);
    const at = this.#reserve(8);
    this.#buffer.writeBigUInt64BE(value, at);
  }

  bytes(value: Uint8Array): void {
    const at = this.#reserve(value.length);
    this.#buffer.set(value, at);
  }

  /** Writes the size of what `body` writes in front of it. */
  sized(body: () => void): void {
    const at = this.#reserve(2);
    body();
    const size = this.#length - at - 2;
    if (size > 0xffff) throw new TpmError('usage', `a sized field of ${size} bytes is too long`);
    this.#buffer.writeUInt16BE(size, at);
  }

  get length(): number {
    return this.#length;
  }

  /** What was written so far, until the next write. */
  get written(): Uint8Array {
    return this.#buffer.subarray(0, this.#length);
  }

  /** A copy of what was written. */
  finish(): Buffer {
    const out = Buffer.alloc(this.#length);
    out.set(this.written);
    return out;
  }

  wipe(): void {
    this.#buffer.fill(0, 0, this.#length);
    this.#length = 0;
  }
}

/** Reads within bounds. Byte strings come out as copies, so that the source can be wiped. */
export class Reader {
  #offset = 0;
  constructor(
    private readonly source: Uint8Array,
    readonly what: string,
  ) {}

  get left(): number {
    return this.source.length - this.#offset;
  }

  #take(count: number): Uint8Array {
    if (count > this.left) {
      throw new TpmError('malformed', `${this.what}: ${count} bytes wanted, ${this.left} left`);
    }
    const at = this.#offset;
    this.#offset += count;
    return this.source.subarray(at, at + count);
  }

  unsigned(size: 1 | 2 | 4): number {
    let value = 0;
    for (const byte of this.#take(size)) value = value * 256 + byte;
    return value;
  }

  u64(): bigint {
    return (BigInt(this.unsigned(4)) << 32n) | BigInt(this.unsigned(4));
  }

  bytes(count: number): Buffer {
    const taken = this.#take(count);
    const out = Buffer.alloc(count);
    out.set(taken);
    return out;
  }

  /** A reader of the next `count` bytes alone. */
  within(count: number): Reader {
    return new Reader(this.#take(count), this.what);
  }

  /** What `body` reads, with the bytes that it read. */
  capture<T>(body: () => T): Embedded<T> {
    const start = this.#offset;
    const value = body();
    const bytes = Buffer.alloc(this.#offset - start);
    bytes.set(this.source.subarray(start, this.#offset));
    return { bytes, value };
  }

  /** @throws TpmError `malformed` when bytes are left */
  end(): void {
    if (this.left > 0) throw new TpmError('malformed', `${this.what}: ${this.left} bytes left over`);
  }
}
