import type { StoreEntry, StoreWrite } from './state-store.js';

/**
 * What the manager and its store process say to each other over their private socket. Both sides read bounded frames
 * and refuse anything else: the store process parses a disk that someone may have written to, so it may be anyone's.
 *
 *     frame    = length u32 (of what follows) | code u8 | id u32 | body
 *     get      = key
 *     commit   = count u16 | write*            write = key | version u64 | valueLength u32 (or REMOVE) | value
 *     list     = key (empty: from the start) | limit u16
 *     entries  = entry*                        entry = key | version u64 | valueLength u32 | value
 *     key      = length u8 | ASCII
 *
 * All integers are big-endian. Requests are answered in order; the answer to id 0 says that the store is open.
 */
export const Request = { get: 1, commit: 2, list: 3 } as const;

/** `done` has entries as its body, the others a sentence in UTF-8. */
export const Answer = {
  done: 1,
  stale: 2,
  /** Nothing was written. */
  full: 3,
  corrupt: 4,
  missing: 5,
  exists: 6,
  /** A newer LMDB wrote the files. */
  newer: 7,
  failed: 8,
} as const;

export interface Frame {
  readonly code: number;
  readonly id: number;
  readonly body: Buffer;
}

/** A batch of 8 MiB with one value of 4 MiB on top, and room for the keys. */
export const MAX_FRAME_BYTES = 13 * 1024 * 1024;
/** What a page of records may reach before the store process ends it. */
export const PAGE_BYTES = 4 * 1024 * 1024;
const HEADER_BYTES = 9;
const REMOVE = 0xffffffff;

export class ProtocolError extends Error {
  override readonly name = 'ProtocolError';
}

export function encodeFrame(code: number, id: number, body: readonly Uint8Array[]): Buffer {
  const length = body.reduce((sum, part) => sum + part.length, 0);
  if (HEADER_BYTES + length > MAX_FRAME_BYTES)
    throw new ProtocolError(`a frame of ${length} bytes is too large`);
  const header = Buffer.alloc(HEADER_BYTES);
  header.writeUInt32BE(HEADER_BYTES - 4 + length, 0);
  header.writeUInt8(code, 4);
  header.writeUInt32BE(id, 5);
  return Buffer.concat([header, ...body], HEADER_BYTES + length);
}

/** Cuts a byte stream into frames. Each body has its own memory. */
export class FrameReader {
  #chunks: Buffer[] = [];
  #size = 0;

  /** @throws ProtocolError */
  *push(chunk: Buffer): Generator<Frame> {
    this.#chunks.push(chunk);
    this.#size += chunk.length;
    while (this.#size >= 4) {
      const length = this.#peekLength();
      if (length < HEADER_BYTES - 4 || length > MAX_FRAME_BYTES - 4) {
        throw new ProtocolError(`a frame says that it has ${length} bytes`);
      }
      if (this.#size < 4 + length) return;
      const frame = this.#take(4 + length);
      yield { code: frame.readUInt8(4), id: frame.readUInt32BE(5), body: frame.subarray(HEADER_BYTES) };
    }
  }

  #peekLength(): number {
    const first = this.#chunks[0];
    if (first && first.length >= 4) return first.readUInt32BE(0);
    const all = Buffer.concat(this.#chunks);
    this.#chunks = [all];
    return all.readUInt32BE(0);
  }

  #take(length: number): Buffer {
    const out = Buffer.allocUnsafeSlow(length);
    let filled = 0;
    while (filled < length) {
      const chunk = this.#chunks[0];
      if (!chunk) throw new ProtocolError('the frame reader lost count');
      const used = Math.min(chunk.length, length - filled);
      chunk.copy(out, filled, 0, used);
      filled += used;
      if (used === chunk.length) this.#chunks.shift();
      else this.#chunks[0] = chunk.subarray(used);
    }
    this.#size -= length;
    return out;
  }
}

export function encodeKey(key: string): Buffer {
  const out = Buffer.alloc(1 + key.length);
  out.writeUInt8(key.length, 0);
  out.write(key, 1, 'latin1');
  return out;
}

export function encodeList(after: string | undefined, limit: number): Uint8Array[] {
  const tail = Buffer.alloc(2);
  tail.writeUInt16BE(limit, 0);
  return [encodeKey(after ?? ''), tail];
}

export function encodeWrites(writes: readonly StoreWrite[]): Uint8Array[] {
  const count = Buffer.alloc(2);
  count.writeUInt16BE(writes.length, 0);
  const out: Uint8Array[] = [count];
  for (const { key, expectedVersion, value } of writes) {
    out.push(encodeKey(key), encodeLengths(expectedVersion, value === null ? REMOVE : value.length));
    if (value !== null) out.push(value);
  }
  return out;
}

export function encodeEntries(entries: readonly StoreEntry[]): Uint8Array[] {
  return entries.flatMap(({ key, version, value }) => [
    encodeKey(key),
    encodeLengths(version, value.length),
    value,
  ]);
}

/** Values are views into `body`. @throws ProtocolError */
export function decodeWrites(body: Buffer): StoreWrite[] {
  const cursor = new Cursor(body);
  const writes: StoreWrite[] = [];
  for (let left = cursor.unsigned(2); left > 0; left--) {
    const key = cursor.key();
    const expectedVersion = cursor.version();
    const length = cursor.unsigned(4);
    writes.push({ key, expectedVersion, value: length === REMOVE ? null : cursor.bytes(length) });
  }
  cursor.end();
  return writes;
}

/** Values are views into `body`. @throws ProtocolError */
export function decodeEntries(body: Buffer): StoreEntry[] {
  const cursor = new Cursor(body);
  const entries: StoreEntry[] = [];
  while (!cursor.atEnd) {
    entries.push({ key: cursor.key(), version: cursor.version(), value: cursor.bytes(cursor.unsigned(4)) });
  }
  return entries;
}

/** @throws ProtocolError */
export function decodeKey(body: Buffer): string {
  const cursor = new Cursor(body);
  const key = cursor.key();
  cursor.end();
  return key;
}

/** @throws ProtocolError */
export function decodeList(body: Buffer): { after: string | undefined; limit: number } {
  const cursor = new Cursor(body);
  const after = cursor.key();
  const limit = cursor.unsigned(2);
  cursor.end();
  return { after: after === '' ? undefined : after, limit };
}

function encodeLengths(version: number, length: number): Buffer {
  const out = Buffer.alloc(12);
  out.writeBigUInt64BE(BigInt(version), 0);
  out.writeUInt32BE(length, 8);
  return out;
}

class Cursor {
  #offset = 0;
  constructor(private readonly body: Buffer) {}

  get atEnd(): boolean {
    return this.#offset === this.body.length;
  }

  bytes(length: number): Buffer {
    const end = this.#offset + length;
    if (end > this.body.length) throw new ProtocolError('a frame ends in the middle of a field');
    const out = this.body.subarray(this.#offset, end);
    this.#offset = end;
    return out;
  }

  unsigned(bytes: 1 | 2 | 4): number {
    return this.bytes(bytes).readUIntBE(0, bytes);
  }

  key(): string {
    return this.bytes(this.unsigned(1)).toString('latin1');
  }

  version(): number {
    const version = Number(this.bytes(8).readBigUInt64BE(0));
    if (!Number.isSafeInteger(version)) throw new ProtocolError('a version is out of range');
    return version;
  }

  end(): void {
    if (!this.atEnd) throw new ProtocolError('a frame has bytes after its last field');
  }
}
