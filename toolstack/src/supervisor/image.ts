import { createHash } from 'node:crypto';
import {
  chmodSync,
  closeSync,
  constants,
  copyFileSync,
  fstatSync,
  mkdirSync,
  mkdtempSync,
  openSync,
  readdirSync,
  readSync,
  renameSync,
  rmSync,
} from 'node:fs';
import { dirname, join } from 'node:path';
import { privateDirectory, syncDirectory } from 'vtpm-common';
import { ToolstackError } from '../error.js';
import type { ImageFile, ImageSources } from './image-sources.js';
import { type ImageCommand, SANDBOX_TEMPLATE } from './sandbox.js';

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

/** A private, read-only copy of everything a worker executes, named by its digest. */
export interface WorkerImage {
  /** SHA-256, hex: what tickets name and the manager's allow-list holds. */
  readonly digest: string;
  readonly parts: readonly ImagePart[];
  readonly command: ImageCommand;
}

/** Mount points of the sandbox: a read-only root cannot be given them later. */
const EMPTY_DIRECTORIES = ['proc', 'dev'];

/**
 * Copies the worker into `directory/<digest>/root` and measures the copy, never its source: what is hashed is what
 * runs. A copy that is there already is measured again. Copies of other digests are removed, so call it only while
 * no worker runs.
 */
export function prepareImage(sources: ImageSources, directory: string): WorkerImage {
  privateDirectory(directory);
  const existing = findCopy(sources, directory);
  removeOthers(directory, existing?.digest);
  if (existing) return existing;
  const building = mkdtempSync(join(directory, 'building-'));
  copyInto(join(building, 'root'), sources.files);
  const copied = measure(join(building, 'root'));
  if (!copied) throw new ToolstackError('internal', `${building} does not hold what was copied into it`);
  const digest = digestOf(copied, sources);
  renameSync(building, join(directory, digest));
  syncDirectory(directory);
  return imageOf(digest, copied, join(directory, digest), sources);
}

/** @returns undefined where there is no copy, or one that is torn or was changed */
function findCopy(sources: ImageSources, directory: string): WorkerImage | undefined {
  if (readdirSync(directory).length === 0) return undefined;
  // The digest of the sources only says where to look.
  const files = sources.files.map((file) => partOf(file.to, file.from, modeOf(file)));
  const place = join(directory, digestOf(files, sources));
  const parts = measure(join(place, 'root'));
  return parts && place === join(directory, digestOf(parts, sources))
    ? imageOf(digestOf(parts, sources), parts, place, sources)
    : undefined;
}

/** Over all that decides what a worker does: every file, node's arguments, the environment and the sandbox. */
function digestOf(parts: readonly ImagePart[], { argv, env }: Pick<ImageSources, 'argv' | 'env'>): string {
  const lines = [
    'vtpm worker image 1',
    ...parts.map(({ name, mode, sha256 }) => JSON.stringify([name, mode, sha256])).sort(),
    JSON.stringify(argv),
    JSON.stringify(Object.entries(env).sort(([a], [b]) => (a < b ? -1 : 1))),
    JSON.stringify(SANDBOX_TEMPLATE),
  ];
  return createHash('sha256').update(lines.join('\n')).digest('hex');
}

function imageOf(
  digest: string,
  parts: readonly ImagePart[],
  place: string,
  sources: ImageSources,
): WorkerImage {
  const { node, loader, libraries, argv, env } = sources;
  return { digest, parts, command: { root: join(place, 'root'), node, loader, libraries, argv, env } };
}

function copyInto(root: string, files: readonly ImageFile[]): void {
  for (const name of ['', ...EMPTY_DIRECTORIES])
    mkdirSync(join(root, name), { recursive: true, mode: 0o755 });
  for (const file of files) {
    const target = join(root, file.to);
    mkdirSync(dirname(target), { recursive: true, mode: 0o755 });
    copyFileSync(file.from, target, constants.COPYFILE_EXCL | constants.COPYFILE_FICLONE);
    chmodSync(target, Number.parseInt(modeOf(file), 8));
  }
}

function modeOf(file: ImageFile): string {
  return file.executable ? '555' : '444';
}

/** @returns undefined where it is not a tree of plain files only */
function measure(root: string): ImagePart[] | undefined {
  const parts: ImagePart[] = [];
  const pending = [''];
  try {
    for (let directory = pending.pop(); directory !== undefined; directory = pending.pop()) {
      for (const item of readdirSync(join(root, directory), { withFileTypes: true })) {
        const name = `${directory}/${item.name}`;
        if (item.isDirectory()) pending.push(name);
        else if (item.isFile()) parts.push(partOf(name, join(root, name)));
        else return undefined;
      }
    }
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return undefined;
    throw error;
  }
  return parts.sort((a, b) => (a.name < b.name ? -1 : 1));
}

function partOf(name: string, path: string, mode?: string): ImagePart {
  const fd = openSync(path, constants.O_RDONLY | (constants.O_NOFOLLOW * (mode === undefined ? 1 : 0)));
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

function removeOthers(directory: string, keep?: string): void {
  for (const name of readdirSync(directory)) {
    if (name !== keep) rmSync(join(directory, name), { recursive: true, force: true });
  }
}
