import { createHash } from 'node:crypto';
import {
  type BigIntStats,
  closeSync,
  constants,
  fstatSync,
  lstatSync,
  openSync,
  readdirSync,
  readSync,
} from 'node:fs';
import { join } from 'node:path';

/** One file of the image, as it was measured. */
export interface ImagePart {
  /** Path inside the image. */
  readonly name: string;
  /** Permission bits, octal. */
  readonly mode: string;
  /** Hex, 32 bytes. */
  readonly sha256: string;
  readonly bytes: number;
}

/**
 * What stat(2) says of each file and directory of a tree, by path. The time of change is the kernel's: who may not set
 * the clock of the host cannot write to one of them, replace it, or put it back as it was, without another stamp.
 */
export type Stamps = ReadonlyMap<string, string>;

export interface MeasuredTree {
  readonly parts: readonly ImagePart[];
  readonly stamps: Stamps;
}

/** Of the kernel's clock for files: with CONFIG_HZ=100 two changes within 10 ms can bear the same time. */
const CLOCK_TICK_MS = 20;

/**
 * Hashes every file. A file that changes after it was hashed has other stamps, also where that happens before this returns.
 * @returns undefined where it is not a tree of plain files only, or changes meanwhile
 */
export function measureTree(root: string): MeasuredTree | undefined {
  letClockPass(root);
  const before = stampsOf(root);
  if (!before) return undefined;
  const parts: ImagePart[] = [];
  for (const [name, { isFile }] of before.entries) {
    if (isFile) parts.push(measureFile(name, join(root, name), constants.O_NOFOLLOW));
  }
  const after = stampsOf(root);
  if (!after || firstChange(before.stamps, after.stamps) !== undefined) return undefined;
  return { parts: parts.sort((a, b) => (a.name < b.name ? -1 : 1)), stamps: before.stamps };
}

/**
 * @returns the first path that is not as it was stamped, undefined where all are. Costs one lstat(2) for each: what was added
 * to a directory, or taken from it, changed the directory.
 */
export function changedSince(root: string, stamps: Stamps): string | undefined {
  for (const [name, stamp] of stamps) {
    const stat = lstatSync(join(root, name), { bigint: true, throwIfNoEntry: false });
    if (!stat || stampOf(stat) !== stamp) return name === '' ? '/' : name;
  }
  return undefined;
}

/** @param mode as it will be in the image; the file's own unless given @param flags of open(2) beside O_RDONLY */
export function measureFile(name: string, path: string, flags = 0, mode?: string): ImagePart {
  const fd = openSync(path, constants.O_RDONLY | flags);
  try {
    const hash = createHash('sha256');
    const chunk = Buffer.allocUnsafe(1 << 20);
    let bytes = 0;
    for (let read = readSync(fd, chunk); read > 0; read = readSync(fd, chunk)) {
      hash.update(chunk.subarray(0, read));
      bytes += read;
    }
    const permissions = (fstatSync(fd).mode & 0o7777).toString(8);
    return { name, mode: mode ?? permissions, sha256: hash.digest('hex'), bytes };
  } finally {
    closeSync(fd);
  }
}

/** Device and inode: which file or directory it is, under whatever path. `stamp` as in `Stamps`. */
export function identityIn(stamp: string | undefined): string | undefined {
  return stamp?.split(' ', 1)[0];
}

interface Found {
  readonly stamps: Map<string, string>;
  readonly entries: Map<string, { readonly isFile: boolean }>;
}

function stampsOf(root: string): Found | undefined {
  const stamps = new Map<string, string>();
  const entries = new Map<string, { isFile: boolean }>();
  const pending = [''];
  try {
    for (let name = pending.pop(); name !== undefined; name = pending.pop()) {
      const path = join(root, name);
      const stat = lstatSync(path, { bigint: true });
      const isFile = stat.isFile();
      if (!isFile && !stat.isDirectory()) return undefined;
      stamps.set(name, stampOf(stat));
      entries.set(name, { isFile });
      if (!isFile) for (const item of readdirSync(path)) pending.push(`${name}/${item}`);
    }
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return undefined;
    throw error;
  }
  return { stamps, entries };
}

function stampOf({ dev, ino, mode, uid, gid, nlink, size, mtimeNs, ctimeNs }: BigIntStats): string {
  return `${dev}:${ino} ${mode} ${uid} ${gid} ${nlink} ${size} ${mtimeNs} ${ctimeNs}`;
}

function firstChange(before: Stamps, after: Stamps): string | undefined {
  for (const [name, stamp] of before) if (after.get(name) !== stamp) return name === '' ? '/' : name;
  for (const name of after.keys()) if (!before.has(name)) return name;
  return undefined;
}

/** What was written right before would bear the same time as a change right after. */
function letClockPass(root: string): void {
  const found = stampsOf(root);
  if (!found) return;
  const newest = Math.max(
    ...[...found.stamps.values()].map((stamp) => Number(stamp.split(' ').at(-1)) / 1e6),
  );
  if (Date.now() - newest > CLOCK_TICK_MS) return;
  Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, CLOCK_TICK_MS);
}
