import { createHash, type Hash } from 'node:crypto';
import { type FileHandle, open } from 'node:fs/promises';
import {
  type BackupEntry,
  type BackupFacts,
  type BackupHeader,
  type BackupStatement,
  boxKeyPair,
  bytesEqual,
} from 'vtpm-proto';
import { ManagerError } from '../error.js';
import { openEnvelope, wipe } from '../keys/index.js';
import {
  checkPreamble,
  checkTrailer,
  damaged,
  envelopeNames,
  FRAME_HEAD_BYTES,
  Frame,
  MAX_FRAME_BYTES,
  PREAMBLE_BYTES,
  parse,
  parseHeader,
  sha256,
  verifiedFacts,
} from './format.js';

export interface BackupStart {
  readonly header: BackupHeader;
  /** SHA-256 of the file up to the end of the header: names this backup in each of its entries. */
  readonly digest: Buffer;
}

export interface ReadEntry extends BackupEntry {
  readonly parsed: BackupFacts;
}

/**
 * Reads a backup from its beginning to its end, one entry at a time, and verifies each as far as it goes without the
 * operator's key. That nothing was cut off, exchanged or left out is known when it resolves.
 * @throws ManagerError `bad-request` that says what is wrong, `newer-format`
 */
export async function readBackup(
  path: string,
  visit: (start: BackupStart, entry: ReadEntry) => void | Promise<void>,
): Promise<BackupStart & { readonly statement: BackupStatement }> {
  const file = await openFile(path);
  try {
    const bytes = new Bytes(file);
    const begin = await bytes.take(PREAMBLE_BYTES).catch(() => Buffer.alloc(0));
    checkPreamble(begin);
    const head = await bytes.frame();
    if (head.type !== Frame.header) throw damaged('it has no header');
    const start = { header: parseHeader(head.body), digest: bytes.digest.copy().digest() };
    let previous: Uint8Array | undefined;
    for (let index = 0; ; index++) {
      const digest = bytes.digest.copy();
      const { type, body } = await bytes.frame();
      if (type === Frame.trailer) {
        const statement = checkEnd(start.header, index, digest.digest(), body);
        await bytes.expectEnd();
        return { ...start, statement };
      }
      if (type !== Frame.entry) throw damaged(`it has a part of type ${type}, which there is not`);
      const entry = checkEntry(start, index, body, previous);
      previous = entry.parsed.vtpmUuid;
      await visit(start, entry);
    }
  } finally {
    await file.close();
  }
}

/** @throws ManagerError `bad-request` where the backup is for another key */
export function checkRecipient({ recipient }: BackupHeader, secretKey: Uint8Array): void {
  const { publicKey, secretKey: copy } = boxKeyPair(secretKey);
  wipe(copy);
  if (bytesEqual(publicKey, recipient)) return;
  throw new ManagerError(
    'bad-request',
    `this backup is encrypted to another key than this one: its public half is ${Buffer.from(recipient).toString('hex')}`,
  );
}

/** @returns a serialised BackupContent; the caller wipes it @throws ManagerError `bad-request` */
export function openEntry(secretKey: Uint8Array, start: BackupStart, entry: ReadEntry): Buffer {
  const content = openEnvelope(secretKey, envelopeNames(start.digest, entry.facts), entry.envelope);
  if (bytesEqual(sha256(content), entry.parsed.contentDigest)) return content;
  wipe(content);
  throw damaged('an entry holds another state than the manager put into it');
}

function checkEntry(
  start: BackupStart,
  index: number,
  body: Buffer,
  previous: Uint8Array | undefined,
): ReadEntry {
  const entry = parse('BackupEntry', body, 'an entry');
  const parsed = verifiedFacts(start.header.signer, start.digest, entry);
  if (parsed.index !== index) throw damaged(`entry ${parsed.index} is in the place of entry ${index}`);
  if (parsed.vtpmUuid.length !== 16 || parsed.vmUuid.length !== 16) throw damaged('an entry has no UUID');
  if (previous && Buffer.compare(previous, parsed.vtpmUuid) >= 0)
    throw damaged('its entries are out of order');
  const hasState = parsed.kind === 'LIVE' && parsed.generation > 0n;
  if (hasState !== entry.envelope.length > 0 || hasState !== (parsed.contentDigest.length === 32)) {
    throw damaged('an entry has a state that does not fit its kind');
  }
  return { ...entry, parsed };
}

function checkEnd(
  { signer, count }: BackupHeader,
  found: number,
  digest: Buffer,
  body: Buffer,
): BackupStatement {
  const { statement, signature } = parse('BackupTrailer', body, 'its end');
  checkTrailer(signer, statement, signature);
  const stated = parse('BackupStatement', statement, 'its end');
  if (stated.count !== found || count !== found) throw damaged(`it has ${found} entries and says ${count}`);
  if (!bytesEqual(stated.digest, digest)) throw damaged('something in it was changed');
  return stated;
}

async function openFile(path: string): Promise<FileHandle> {
  try {
    return await open(path, 'r');
  } catch (cause) {
    throw new ManagerError('bad-request', `${path} cannot be read: ${(cause as Error).message}`, { cause });
  }
}

/** A file, read in order; `digest` covers what was taken. */
class Bytes {
  readonly digest: Hash = createHash('sha256');
  constructor(private readonly file: FileHandle) {}

  async frame(): Promise<{ type: number; body: Buffer }> {
    const head = await this.take(FRAME_HEAD_BYTES);
    const length = head.readUInt32BE(1);
    if (length > MAX_FRAME_BYTES) throw damaged('a part of it is longer than any can be');
    return { type: head.readUInt8(0), body: await this.take(length) };
  }

  async take(length: number): Promise<Buffer> {
    const bytes = Buffer.alloc(length);
    for (let at = 0; at < length; ) {
      const { bytesRead } = await this.file.read(bytes, at, length - at);
      if (bytesRead === 0) throw damaged('it is cut off, its end is missing');
      at += bytesRead;
    }
    this.digest.update(bytes);
    return bytes;
  }

  async expectEnd(): Promise<void> {
    const { bytesRead } = await this.file.read(Buffer.alloc(1), 0, 1);
    if (bytesRead > 0) throw damaged('something follows its end');
  }
}
