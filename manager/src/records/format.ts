import { createHmac, hash, timingSafeEqual } from 'node:crypto';
import {
  bytesEqual,
  decode,
  encode,
  ProtoError,
  type RecordHeader,
  type SealedPart,
  type StoredRecord,
  uuidToText,
} from 'vtpm-proto';
import { ManagerError } from '../error.js';
import { type KeyHierarchy, type RootKeys, WRAPPED_KEY_BYTES } from '../keys/index.js';

/** Format number of records that are not about a migration. */
export const FIRST_FORMAT = 1;
/**
 * The newest format number; a newer one is refused by name. A record that says anything of a migration has it, so that a
 * manager of before them takes no vTPM for its own that may live elsewhere.
 */
export const RECORD_FORMAT = 2;

function formatOf({ kind, departure, unsettled, lineage, referenceKey }: RecordHeader): number {
  const isPlain =
    kind !== 'MOVED' && !departure && !referenceKey && unsettled.length === 0 && lineage.length === 0;
  return isPlain ? FIRST_FORMAT : RECORD_FORMAT;
}

/** What people and programs outside call the kinds. */
export const KIND_NAMES = { LIVE: 'live', RETIRED: 'retired', MOVED: 'moved' } as const satisfies Record<
  RecordHeader['kind'],
  string
>;
export type KindName = (typeof KIND_NAMES)[RecordHeader['kind']];

/** A verified record. Parts are sealed; the header is in the clear and authenticated. */
export interface VtpmRecord {
  readonly header: RecordHeader;
  readonly parts: readonly SealedPart[];
}

/** @returns the bytes to store under the vTPM's uuid */
export function encodeRecord(keys: KeyHierarchy, record: VtpmRecord): Buffer {
  const header = encode('RecordHeader', { ...record.header, format: formatOf(record.header) });
  const parts = record.parts.map((part) => encode('SealedPart', part));
  return encode('StoredRecord', {
    header,
    parts,
    mac: recordMac(keys.ofGeneration(record.header.keyId, 'a record'), record.header.vtpmUuid, header, parts),
  });
}

/**
 * @param vtpmUuid the 16-byte uuid the bytes were stored under
 * @throws ManagerError `newer-format`; `store-corrupt` for a record that was changed, or is another vTPM's or store's
 */
export function decodeRecord(keys: KeyHierarchy, vtpmUuid: Uint8Array, bytes: Uint8Array): VtpmRecord {
  const name = uuidToText(vtpmUuid);
  try {
    const stored = decode('StoredRecord', bytes);
    checkFormat(name, stored.header);
    const header = decode('RecordHeader', stored.header);
    verifyMac(keys.ofGeneration(header.keyId, `the record of vTPM ${name}`), name, vtpmUuid, stored);
    // protobuf has many encodings of one message; only the one that was written is taken. Those of header and parts are
    // authenticated.
    if (!bytesEqual(encode('StoredRecord', stored), bytes))
      throw corrupt(name, 'is not encoded as it was written');
    checkHeader(keys, name, vtpmUuid, header);
    return { header, parts: stored.parts.map((part) => decode('SealedPart', part)) };
  } catch (error) {
    if (!(error instanceof ProtoError)) throw error;
    throw corrupt(name, `is not readable (${error.message})`, error);
  }
}

/** Longer than any tombstone: it has no state, no key and no session. */
const MAX_TOMBSTONE_BYTES = 8192;

/** The header of stored bytes, not verified, where it is of a tombstone or says anything of a migration. */
export function glance(bytes: Uint8Array): RecordHeader | undefined {
  try {
    const { header } = decode('StoredRecord', bytes);
    const isLong = bytes.length > MAX_TOMBSTONE_BYTES;
    return isLong && decodeFormat(header).format === FIRST_FORMAT
      ? undefined
      : decode('RecordHeader', header);
  } catch (error) {
    if (error instanceof ProtoError) return undefined;
    throw error;
  }
}

/** Whether stored bytes are of a vTPM that does not live here (any more). Not verified. */
export function isTombstone(bytes: Uint8Array): boolean {
  return (glance(bytes)?.kind ?? 'LIVE') !== 'LIVE';
}

/**
 * Looks at the format number before anything else is read or verified: a newer version may have changed all of it.
 * The writer puts field 1 first (tag byte 0x08, then a varint).
 */
function checkFormat(name: string, header: Uint8Array): void {
  const { format } = header[0] === 0x08 ? decodeFormat(header) : { format: 0 };
  if (format > RECORD_FORMAT) {
    throw new ManagerError(
      'newer-format',
      `vTPM ${name} has a record of format ${format}, this version knows ${RECORD_FORMAT}; run the version that wrote it`,
    );
  }
  if (format < FIRST_FORMAT) throw corrupt(name, `has format ${format}`);
}

function decodeFormat(header: Uint8Array): { format: number } {
  let format = 0;
  for (let index = 1; index < Math.min(header.length, 6); index++) {
    const byte = header[index] ?? 0;
    format += (byte & 0x7f) * 2 ** (7 * (index - 1));
    if (byte < 0x80) break;
  }
  return { format };
}

function verifyMac(keys: RootKeys, name: string, vtpmUuid: Uint8Array, stored: StoredRecord): void {
  const expected = recordMac(keys, vtpmUuid, stored.header, stored.parts);
  if (stored.mac.length !== expected.length || !timingSafeEqual(stored.mac, expected)) {
    throw corrupt(name, 'does not authenticate: it was changed, or belongs to another vTPM or store');
  }
}

function checkHeader(keys: KeyHierarchy, name: string, vtpmUuid: Uint8Array, header: RecordHeader): void {
  if (!bytesEqual(header.vtpmUuid, vtpmUuid)) throw corrupt(name, 'is the record of another vTPM');
  if (!bytesEqual(header.storeId, keys.storeId)) throw corrupt(name, 'is a record of another store');
  const isLive = header.kind === 'LIVE';
  if (header.wrappedDataKey.length !== (isLive ? WRAPPED_KEY_BYTES : 0)) {
    throw corrupt(name, 'has a data key that does not fit its kind');
  }
  if (header.session && (header.departure || !isLive)) {
    throw corrupt(name, 'has a session, although nobody may run it here');
  }
}

/**
 * HMAC-SHA256 over a domain, the uuid, and the SHA-256 of the header and of each serialised part. Every item has a
 * fixed length, so that nothing can be shifted from one into another.
 */
function recordMac(
  keys: RootKeys,
  vtpmUuid: Uint8Array,
  header: Uint8Array,
  parts: readonly Uint8Array[],
): Buffer {
  const mac = createHmac('sha256', keys.recordMacKey)
    .update('vtpm.v1 record\0')
    .update(vtpmUuid)
    .update(hash('sha256', header, 'buffer'));
  for (const part of parts) mac.update(hash('sha256', part, 'buffer'));
  return mac.digest();
}

function corrupt(name: string, what: string, cause?: unknown): ManagerError {
  return new ManagerError(
    'store-corrupt',
    `the record of vTPM ${name} ${what}; restore the store from a backup`,
    cause === undefined ? {} : { cause },
  );
}
