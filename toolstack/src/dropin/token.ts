import { createHash, randomBytes } from 'node:crypto';
import {
  closeSync,
  constants,
  fchmodSync,
  fchownSync,
  fstatSync,
  fsyncSync,
  openSync,
  readSync,
  rmSync,
  writeSync,
} from 'node:fs';
import { createFileDurably, type FileOwner, writeFileDurably } from 'vtpm-common/files';
import { DropinRefusal } from './refusal.js';
import type { ResolvedPlace } from './state-place.js';

const { O_NOFOLLOW, O_RDWR } = constants;

/** Newer ones are refused by name. */
const TOKEN_FORMAT = 1;
const MAX_TOKEN_BYTES = 4096;

/** The right to start one vTPM, in a file that its owner alone may read. */
export interface Token {
  /** Of the vTPM. */
  readonly id: string;
  readonly vmUuid: string;
  /** 32 bytes, hex. The supervisor has its SHA-256 only. */
  readonly secret: string;
}

export function newSecret(): string {
  return randomBytes(32).toString('hex');
}

/** What the supervisor keeps of a secret, hex. */
export function digestOf(secret: string): string {
  return createHash('sha256').update(Buffer.from(secret, 'hex')).digest('hex');
}

/**
 * @returns undefined where there is no token: no file, or a file place of zeros
 * @throws DropinRefusal where it cannot be read, others may read it too, or it is something else
 */
export function readToken({ token: path, isFile }: ResolvedPlace): Token | undefined {
  let fd: number;
  try {
    fd = openSync(path, 'r');
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException;
    if (code === 'ENOENT') return undefined;
    throw new DropinRefusal(
      `the vTPM's token ${path} cannot be read (${code}); run this as the user that it belongs to`,
    );
  }
  try {
    const stat = fstatSync(fd);
    if (stat.isFile() && !isFile && (stat.mode & 0o077) !== 0) {
      throw new DropinRefusal(`others may read the vTPM's token ${path}; run: chmod 600 ${path}`);
    }
    const content = Buffer.alloc(MAX_TOKEN_BYTES);
    const text = content.toString('utf8', 0, readSync(fd, content, 0, MAX_TOKEN_BYTES, 0));
    if (isFile && /^\0*$/.test(text)) return undefined;
    return parseToken(path, text.split('\n', 1)[0] ?? '');
  } finally {
    closeSync(fd);
  }
}

function parseToken(path: string, line: string): Token {
  let value: unknown;
  try {
    value = JSON.parse(line);
  } catch {
    // Said below.
  }
  const { format, id, vmUuid, secret } = (value ?? {}) as Record<string, unknown>;
  if (typeof format === 'number' && format > TOKEN_FORMAT) {
    throw new DropinRefusal(
      `${path} has format ${format}, this version knows ${TOKEN_FORMAT}; use the newer vtpm-manager`,
    );
  }
  if (format !== TOKEN_FORMAT || !isText(id) || !isText(vmUuid) || !isText(secret)) {
    throw new DropinRefusal(
      `${path} is no vTPM token; state of swtpm is not taken over from there, see docs/dropin.md, and what else it is must be moved away`,
    );
  }
  return { id, vmUuid, secret };
}

function isText(value: unknown): value is string {
  return typeof value === 'string' && value.length <= 64;
}

/**
 * In the place of the token that may be there. Durable when it returns.
 * @param owner who gets it. Another user's directory is not trusted: nothing is changed by its path
 * @throws DropinRefusal where a file place is not that owner's alone, Error where it cannot be written
 */
export function writeToken({ token: path, isFile }: ResolvedPlace, token: Token, owner?: FileOwner): void {
  if (isFile) writeInto(path, textOf(token), owner);
  else writeFileDurably(path, textOf(token), 0o600, owner);
}

/** Where there is no token yet. Durable when it returns. @throws Error `EEXIST` where there is one meanwhile */
export function createToken({ token: path, isFile }: ResolvedPlace, token: Token): void {
  if (isFile) writeInto(path, textOf(token), undefined);
  else createFileDurably(path, textOf(token), token.id);
}

/** After a creation that failed. What is there meanwhile of another one stays. */
export function removeToken(place: ResolvedPlace, { id }: Token): void {
  if (readToken(place)?.id !== id) return;
  const { token: path, isFile } = place;
  if (isFile) writeInto(path, Buffer.alloc(MAX_TOKEN_BYTES), undefined);
  else rmSync(path, { force: true });
}

function textOf(token: Token): Buffer {
  return Buffer.from(`${JSON.stringify({ format: TOKEN_FORMAT, ...token })}\n`);
}

function writeInto(path: string, content: Buffer, owner: FileOwner | undefined): void {
  const fd = openSync(path, O_RDWR | O_NOFOLLOW);
  try {
    const stat = fstatSync(fd);
    if (stat.isFile() && stat.nlink !== 1) {
      throw new DropinRefusal(`${path} has other names (hard links); make a file of its own for the token`);
    }
    if (owner && stat.uid !== owner.uid) {
      throw new DropinRefusal(
        `${path} belongs to user ${stat.uid}, not to ${owner.uid}, for whom the token is; look that it is the right file, then run: chown ${owner.uid} ${path}`,
      );
    }
    if (stat.isFile()) fchmodSync(fd, 0o600);
    if (owner) fchownSync(fd, owner.uid, owner.gid);
    writeSync(fd, content, 0, undefined, 0);
    fsyncSync(fd);
  } finally {
    closeSync(fd);
  }
}
