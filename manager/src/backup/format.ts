import { createHash } from 'node:crypto';
import {
  type BackupEntry,
  type BackupFacts,
  type BackupHeader,
  bytesEqual,
  decode,
  encode,
  type Messages,
  ProtoError,
  type RestoreRequest,
  verifySignature,
} from 'vtpm-proto';
import { ManagerError } from '../error.js';
import { wipe } from '../keys/index.js';

/** Format number of backups; a newer one is refused by name. */
export const BACKUP_FORMAT = 1;
export const MAGIC = Buffer.from('vtpm.v1 backup\n');
/** Magic and format number (u32, big-endian). */
export const PREAMBLE_BYTES = MAGIC.length + 4;

export const Frame = { header: 1, entry: 2, trailer: 3 } as const;
/** Type (u8) and length of the body (u32, big-endian). */
export const FRAME_HEAD_BYTES = 5;
/** What a frame may have; the largest permanent state is 256 KiB. */
export const MAX_FRAME_BYTES = 512 * 1024;
export const PURPOSE = 'backup';

const ENTRY_DOMAIN = Buffer.from('vtpm.v1 backup entry\0');
const TRAILER_DOMAIN = Buffer.from('vtpm.v1 backup\0');

export function preamble(): Buffer {
  const bytes = Buffer.alloc(PREAMBLE_BYTES);
  MAGIC.copy(bytes);
  bytes.writeUInt32BE(BACKUP_FORMAT, MAGIC.length);
  return bytes;
}

/** @throws ManagerError `bad-request` where it is no backup, `newer-format` */
export function checkPreamble(bytes: Uint8Array): void {
  const preamble = Buffer.from(bytes);
  if (preamble.length < PREAMBLE_BYTES || !preamble.subarray(0, MAGIC.length).equals(MAGIC)) {
    throw new ManagerError('bad-request', 'this is no backup: it does not begin as one');
  }
  const format = preamble.readUInt32BE(MAGIC.length);
  if (format > BACKUP_FORMAT) {
    throw new ManagerError(
      'newer-format',
      `this backup has format ${format}, this version reads ${BACKUP_FORMAT}; use the version that made it`,
    );
  }
  if (format !== BACKUP_FORMAT) throw damaged(`it has format ${format}, which there is not`);
}

export function frame(type: number, body: Uint8Array): Buffer {
  const bytes = Buffer.alloc(FRAME_HEAD_BYTES + body.length);
  bytes.writeUInt8(type, 0);
  bytes.writeUInt32BE(body.length, 1);
  bytes.set(body, FRAME_HEAD_BYTES);
  return bytes;
}

/** What the manager signs of an entry. @param headerDigest 32 bytes, of the file up to the end of the header */
export function entryMessage(headerDigest: Uint8Array, facts: Uint8Array): Buffer {
  return Buffer.concat([ENTRY_DOMAIN, headerDigest, facts]);
}

export function trailerMessage(statement: Uint8Array): Buffer {
  return Buffer.concat([TRAILER_DOMAIN, statement]);
}

/** Associated data of the envelope: the state opens only in this place of this backup. */
export const envelopeNames = (headerDigest: Uint8Array, facts: Uint8Array) => ({
  purpose: PURPOSE,
  associated: entryMessage(headerDigest, facts),
});

/** The facts of an entry that `signer` made for this backup. @throws ManagerError `bad-request` */
export function verifiedFacts(
  signer: Uint8Array,
  headerDigest: Uint8Array,
  { facts, signature }: Pick<BackupEntry, 'facts' | 'signature'>,
): BackupFacts {
  if (!verifySignature(signer, entryMessage(headerDigest, facts), signature)) {
    throw damaged('an entry was changed, or is of another backup');
  }
  return parse('BackupFacts', facts, 'an entry');
}

/** The permanent state, a view into the request's bytes, which the caller of all this wipes. */
export function contentOf(facts: BackupFacts, { content = new Uint8Array(0) }: RestoreRequest): Uint8Array {
  if (facts.contentDigest.length === 0) return new Uint8Array(0);
  if (!bytesEqual(sha256(content), facts.contentDigest)) {
    throw new ManagerError('bad-request', 'the state is not the one that was backed up');
  }
  return parse('BackupContent', content, 'the state').permanent;
}

export function checkTrailer(signer: Uint8Array, statement: Uint8Array, signature: Uint8Array): void {
  if (!verifySignature(signer, trailerMessage(statement), signature)) {
    throw damaged('its signature does not verify');
  }
}

/** One encoding alone is taken. Bytes fields of the result are views into `bytes`. @throws ManagerError `bad-request` */
export function parse<
  K extends
    | 'BackupHeader'
    | 'BackupEntry'
    | 'BackupFacts'
    | 'BackupContent'
    | 'BackupTrailer'
    | 'BackupStatement'
    | 'RestoreRequest'
    | 'RescueRequest',
>(name: K, bytes: Uint8Array, what: string): Messages[K] {
  let again: Buffer | undefined;
  try {
    const message = decode(name, bytes);
    again = encode(name, message);
    if (!again.equals(bytes)) throw damaged(`${what} is not encoded as it was written`);
    return message;
  } catch (error) {
    if (!(error instanceof ProtoError)) throw error;
    throw damaged(`${what} is not readable`, error);
  } finally {
    // It has a state in the clear where `bytes` has one.
    wipe(again);
  }
}

/** @throws ManagerError `bad-request` */
export function parseHeader(bytes: Uint8Array): BackupHeader {
  const header = parse('BackupHeader', bytes, 'its header');
  const lengths = [
    [header.backupId, 16],
    [header.storeId, 16],
    [header.managerId, 32],
    [header.recipient, 32],
    [header.signer, 32],
    [header.anchorRoot, 32],
  ] as const;
  if (lengths.some(([field, length]) => field.length !== length)) {
    throw damaged('its header is not one that a manager wrote');
  }
  return header;
}

export function sha256(...parts: readonly Uint8Array[]): Buffer {
  const hash = createHash('sha256');
  for (const part of parts) hash.update(part);
  return hash.digest();
}

export function damaged(what: string, cause?: unknown): ManagerError {
  return new ManagerError('bad-request', `the backup is damaged: ${what}; use another copy of it`, { cause });
}
