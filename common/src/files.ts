import {
  closeSync,
  fchownSync,
  fsyncSync,
  linkSync,
  mkdirSync,
  openSync,
  renameSync,
  rmSync,
  statSync,
  writeSync,
} from 'node:fs';
import { dirname } from 'node:path';
import { barrier } from './barrier.js';

/**
 * Creates a directory that only its owner may enter, and the directories above it. One that is there stays as it is,
 * where nobody else can put something in the place of its files and sockets.
 * @throws Error where another user (root excepted) owns it or everybody may write to it
 */
export function privateDirectory(path: string): string {
  makeDirectory(path, true);
  return checkPrivate(path);
}

/** As `privateDirectory`, for what is of no use after a power loss, such as sockets. */
export function passingDirectory(path: string): string {
  makeDirectory(path, false);
  return checkPrivate(path);
}

function checkPrivate(path: string): string {
  const { uid, mode } = statSync(path);
  if (uid !== 0 && uid !== process.getuid?.()) {
    throw new Error(
      `${path} belongs to user ${uid}, who could replace what is in it; choose another directory`,
    );
  }
  if ((mode & 0o002) !== 0) {
    throw new Error(`everybody may write to ${path} and replace what is in it; run: chmod o-w ${path}`);
  }
  return path;
}

/** Step by step: in a file system that refuses directories Node's `recursive` does not end (/proc) or gives another reason. */
function makeDirectory(path: string, isDurable: boolean): void {
  if (statSync(path, { throwIfNoEntry: false })?.isDirectory()) return;
  const parent = dirname(path);
  if (parent !== path) makeDirectory(parent, isDurable);
  try {
    mkdirSync(path, { mode: 0o700 });
  } catch (error) {
    // Perhaps another process made it meanwhile.
    if (!statSync(path, { throwIfNoEntry: false })?.isDirectory()) throw error;
  }
  // What is written into it durably must not lose its way after a power loss.
  if (isDurable) syncDirectory(parent);
}

export interface FileOwner {
  readonly uid: number;
  readonly gid: number;
}

/**
 * Replaces a file so that after a crash or power loss either the old or the new content is there, never a part.
 * The directory is synced after the rename: before it the old content could come back.
 * @param owner who gets the file. It is given away before it has its name: whoever may write to the directory could put a link
 * to another file there afterwards
 */
export function writeFileDurably(
  path: string,
  content: Uint8Array | string,
  mode = 0o600,
  owner?: FileOwner,
): void {
  const temporary = `${path}.new`;
  rmSync(temporary, { force: true });
  writeNew(temporary, content, mode, owner);
  renameSync(temporary, path);
  barrier('file.renamed');
  syncDirectory(dirname(path));
}

/**
 * As `writeFileDurably`, for a file that is not there yet.
 * @param suffix of the temporary file, another one for each who may write that file
 * @throws Error `EEXIST` where it is there
 */
export function createFileDurably(path: string, content: Uint8Array | string, suffix: string): void {
  const temporary = `${path}.${suffix}`;
  writeNew(temporary, content, 0o600);
  try {
    linkSync(temporary, path);
  } finally {
    rmSync(temporary, { force: true });
  }
  syncDirectory(dirname(path));
}

function writeNew(path: string, content: Uint8Array | string, mode: number, owner?: FileOwner): void {
  const fd = openSync(path, 'wx', mode);
  try {
    if (owner) fchownSync(fd, owner.uid, owner.gid);
    const bytes = typeof content === 'string' ? Buffer.from(content) : content;
    for (let offset = 0; offset < bytes.length; ) offset += writeSync(fd, bytes, offset);
    barrier('file.written');
    fsyncSync(fd);
  } finally {
    closeSync(fd);
  }
  barrier('file.synced');
}

/** Makes creations, renames and removals in a directory durable. */
export function syncDirectory(path: string): void {
  const fd = openSync(path, 'r');
  try {
    fsyncSync(fd);
  } finally {
    closeSync(fd);
  }
}
