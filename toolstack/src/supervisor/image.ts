import { createHash } from 'node:crypto';
import {
  chmodSync,
  constants,
  copyFileSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  renameSync,
  rmSync,
} from 'node:fs';
import { dirname, join } from 'node:path';
import { privateDirectory, syncDirectory } from 'vtpm-common';
import { ToolstackError } from '../error.js';
import type { ImageFile, ImageSources } from './image-sources.js';
import { type ImagePart, type MeasuredTree, measureFile, measureTree, type Stamps } from './image-tree.js';
import { type ImageCommand, launchMeasure } from './sandbox.js';

/** A private, read-only copy of everything a worker executes, named by its digest. */
export interface WorkerImage {
  /** SHA-256, hex: what tickets name and the manager's allow-list holds. */
  readonly digest: string;
  readonly parts: readonly ImagePart[];
  /** Of the copy, when it was measured. */
  readonly stamps: Stamps;
  readonly command: ImageCommand;
}

/** Mount points of the sandbox: a read-only root cannot be given them later. */
const EMPTY_DIRECTORIES = ['proc', 'dev'];

/**
 * Copies the worker into `directory/<digest>/root` and measures the copy, never its source: what is hashed is what
 * runs. A copy that is there already is measured again.
 * @param keep digests of the copies that workers run from; all others are removed
 */
export function prepareImage(
  sources: ImageSources,
  directory: string,
  keep: ReadonlySet<string> = new Set(),
): WorkerImage {
  privateDirectory(directory);
  // For passing only: what is above it is closed, and workers see it in a view of its own (image-view.ts).
  chmodSync(directory, 0o711);
  const existing = findCopy(sources, directory);
  removeOthers(directory, existing ? new Set([...keep, existing.digest]) : keep);
  if (existing) return existing;
  const building = mkdtempSync(join(directory, 'building-'));
  copyInto(join(building, 'root'), sources.files);
  chmodSync(building, 0o711);
  const copied = measureTree(join(building, 'root'));
  if (!copied) throw new ToolstackError('internal', `${building} does not hold what was copied into it`);
  const digest = digestOf(copied.parts, sources);
  const place = join(directory, digest);
  // Of a worker that runs from it, where it is no longer what it was measured to be.
  rmSync(place, { recursive: true, force: true });
  renameSync(building, place);
  syncDirectory(directory);
  return imageOf(digest, copied, place, sources);
}

/** The image as its copy is now. @returns undefined where that is not the one that was measured */
export function measureAgain(image: WorkerImage): WorkerImage | undefined {
  const tree = measureTree(image.command.root);
  return tree && digestOf(tree.parts, image.command) === image.digest ? { ...image, ...tree } : undefined;
}

/** The digest of what is installed, without a copy. */
export function installedDigest(sources: ImageSources): string {
  return digestOf(partsOfSources(sources), sources);
}

/** @returns undefined where there is no copy, or one that is torn or was changed */
function findCopy(sources: ImageSources, directory: string): WorkerImage | undefined {
  if (readdirSync(directory).length === 0) return undefined;
  // The digest of the sources only says where to look.
  const place = join(directory, installedDigest(sources));
  const tree = measureTree(join(place, 'root'));
  return tree && place === join(directory, digestOf(tree.parts, sources))
    ? imageOf(digestOf(tree.parts, sources), tree, place, sources)
    : undefined;
}

function partsOfSources({ files }: ImageSources): ImagePart[] {
  return files.map((file) => measureFile(file.to, file.from, 0, modeOf(file)));
}

/** Over all that decides what a worker does: every file, node's arguments, the environment, the launch and both filters. */
function digestOf(parts: readonly ImagePart[], { argv, env }: Pick<ImageSources, 'argv' | 'env'>): string {
  const lines = [
    'vtpm worker image 1',
    ...parts.map(({ name, mode, sha256 }) => JSON.stringify([name, mode, sha256])).sort(),
    JSON.stringify(argv),
    JSON.stringify(Object.entries(env).sort(([a], [b]) => (a < b ? -1 : 1))),
    launchMeasure(),
  ];
  return createHash('sha256').update(lines.join('\n')).digest('hex');
}

function imageOf(
  digest: string,
  { parts, stamps }: MeasuredTree,
  place: string,
  sources: ImageSources,
): WorkerImage {
  const { node, loader, libraries, argv, env } = sources;
  return {
    digest,
    parts,
    stamps,
    command: { root: join(place, 'root'), node, loader, libraries, argv, env },
  };
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
  // For workers with a uid of their own, whatever the umask; the directories above the images let nobody through.
  for (const item of readdirSync(root, { recursive: true, withFileTypes: true })) {
    if (item.isDirectory()) chmodSync(join(item.parentPath, item.name), 0o755);
  }
  chmodSync(root, 0o755);
}

function modeOf(file: ImageFile): string {
  return file.executable ? '555' : '444';
}

/** Finished or not. */
const COPY = /^([0-9a-f]{64}|building-.*)$/;

function removeOthers(directory: string, keep: ReadonlySet<string>): void {
  for (const name of readdirSync(directory)) {
    if (COPY.test(name) && !keep.has(name)) rmSync(join(directory, name), { recursive: true, force: true });
  }
}
