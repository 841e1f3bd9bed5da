import { readdirSync } from 'node:fs';
import { type FileHandle, open } from 'node:fs/promises';
import { basename, dirname, join } from 'node:path';
import { MAX_LINE_BYTES, readLine } from './line.js';

/**
 * The files of an audit log, oldest first: `audit.000001.log`, …, and last `audit.log`, to which is written. A closed
 * one never changes. The last may be missing where the manager ended between closing one and beginning the next.
 */
export interface Segment {
  readonly path: string;
  /** From 1; of the newest file undefined where only its first entry says it. */
  readonly number: number | undefined;
  /** Where entries are still appended to. */
  readonly isCurrent: boolean;
}

/** An audit log's files as they were at one moment, whatever is appended or closed meanwhile. */
export class Segments {
  private constructor(
    /** Of the newest file. */
    readonly path: string,
    readonly all: readonly Segment[],
    private readonly current: FileHandle | undefined,
  ) {}

  /** @param path of the newest file */
  static async open(path: string): Promise<Segments> {
    // First: when it is closed and renamed meanwhile, the list below has it under its new name too.
    const current = await openIfThere(path);
    try {
      const closed = await withoutFile(closedSegments(path), current);
      const last = closed.at(-1)?.number;
      const number = last === undefined ? undefined : last + 1;
      return new Segments(path, current ? [...closed, { path, number, isCurrent: true }] : closed, current);
    } catch (error) {
      await current?.close();
      throw error;
    }
  }

  /** The lines of one file, some at a time. A file that is gone has none. */
  async *lines(segment: Segment): AsyncGenerator<Line[]> {
    const handle = segment.isCurrent ? this.current : await openIfThere(segment.path);
    if (!handle) return;
    try {
      yield* linesOf(handle);
    } finally {
      if (!segment.isCurrent) await handle.close();
    }
  }

  /**
   * The files from the one that holds entry `n` on, as far as their first lines are to be believed; all of them where
   * none says so. Reads one line of each, from the newest on.
   */
  async from(n: bigint): Promise<readonly Segment[]> {
    for (let i = this.all.length - 1; i > 0; i--) {
      const segment = this.all[i];
      const first = segment && (await this.#firstOf(segment));
      if (first !== undefined && first <= n) return this.all.slice(i);
    }
    return this.all;
  }

  async #firstOf(segment: Segment): Promise<bigint | undefined> {
    for await (const [line] of this.lines(segment)) {
      return line?.end === 'newline' ? readLine(line.bytes, NO_KEYS)?.entry.n : undefined;
    }
    return undefined;
  }

  async close(): Promise<void> {
    await this.current?.close();
  }
}

/** Name of a file that is no longer written to. */
export function closedPath(path: string, number: number): string {
  return join(dirname(path), `${basename(path, '.log')}.${String(number).padStart(6, '0')}.log`);
}

function closedSegments(path: string): { path: string; number: number; isCurrent: false }[] {
  return readdirSync(dirname(path))
    .map((name) => ({ name, number: Number(/\.(\d{6,15})\.log$/.exec(name)?.[1]) }))
    .filter(({ name, number }) => number >= 1 && name === basename(closedPath(path, number)))
    .map(({ number }) => ({ path: closedPath(path, number), number, isCurrent: false as const }))
    .sort((a, b) => a.number - b.number);
}

async function withoutFile<T extends Segment>(segments: T[], current: FileHandle | undefined): Promise<T[]> {
  const last = segments.at(-1);
  const handle = last && current && (await openIfThere(last.path));
  if (!handle) return segments;
  try {
    const [a, b] = [await handle.stat(), await current.stat()];
    return a.ino === b.ino && a.dev === b.dev ? segments.slice(0, -1) : segments;
  } finally {
    await handle.close();
  }
}

async function openIfThere(path: string): Promise<FileHandle | undefined> {
  try {
    return await open(path, 'r');
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return undefined;
    throw error;
  }
}

export interface Line {
  /** Without its newline. Shares memory with others: not to be kept. */
  readonly bytes: Buffer;
  /** In its file. */
  readonly offset: number;
  /** What it ended with; after `too-long` no more is read. */
  readonly end: 'newline' | 'file' | 'too-long';
}

const NO_KEYS = new Map<number, Uint8Array>();
const CHUNK_BYTES = 256 * 1024;
const NEWLINE = 0x0a;

async function* linesOf(handle: FileHandle): AsyncGenerator<Line[]> {
  let rest: Buffer = Buffer.alloc(0);
  let offset = 0;
  for (;;) {
    const chunk = Buffer.allocUnsafe(CHUNK_BYTES);
    const { bytesRead } = await handle.read(chunk, 0, CHUNK_BYTES, offset + rest.length);
    if (bytesRead === 0) break;
    rest = Buffer.concat([rest, chunk.subarray(0, bytesRead)]);
    const lines: Line[] = [];
    let start = 0;
    for (let end = rest.indexOf(NEWLINE); end >= 0; end = rest.indexOf(NEWLINE, start)) {
      lines.push({ bytes: rest.subarray(start, end), offset: offset + start, end: 'newline' });
      start = end + 1;
    }
    offset += start;
    rest = rest.subarray(start);
    if (lines.length > 0) yield lines;
    if (rest.length > MAX_LINE_BYTES) {
      yield [{ bytes: rest, offset, end: 'too-long' }];
      return;
    }
  }
  if (rest.length > 0) yield [{ bytes: rest, offset, end: 'file' }];
}
