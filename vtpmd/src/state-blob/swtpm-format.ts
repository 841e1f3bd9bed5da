import { VtpmdError } from '../error.js';
import type { StateBlobType } from './state-blobs.js';

/**
 * The form in which swtpm gives out and takes state (CMD_GET_STATEBLOB, CMD_SET_STATEBLOB): a header of 10 bytes, u8
 * version, u8 least version of a reader, u16 length of the header, u16 flags, u32 length of the whole; then items, u16 tag, u32
 * length, content. Big-endian. The one item is MIGRATION_DATA, and its content is again items: DATA is libtpms's state.
 */
const HEADER_BYTES = 10;
const ITEM_BYTES = 6;
const VERSION = 2;
const LEAST_VERSION = 1;
const FLAG = { encrypted: 1, migrationEncrypted: 2, migrationData: 4 } as const;
const TAG = { data: 1, encryptedData: 2, migrationData: 4, encryptedMigrationData: 5 } as const;
const ENCRYPTED_TAGS: readonly number[] = [TAG.encryptedData, TAG.encryptedMigrationData];

/** What swtpm takes at most, and so QEMU brings. */
export const MAX_BLOB_BYTES = 512 * 1024;

/** libtpms's own header of a state (NVMarshal.c): u16 version, u32 magic, u16 least version. */
const STATE_HEADER_BYTES = 8;
const STATE_MAGIC: Readonly<Partial<Record<StateBlobType, number>>> = {
  permanent: 0xab364723,
  volatile: 0x45637889,
};

/** @param state of libtpms @returns the blob; the caller wipes both */
export function encodeBlob(state: Uint8Array): Buffer {
  const length = HEADER_BYTES + 2 * ITEM_BYTES + state.length;
  const blob = Buffer.alloc(length);
  blob.writeUInt8(VERSION, 0);
  blob.writeUInt8(LEAST_VERSION, 1);
  blob.writeUInt16BE(HEADER_BYTES, 2);
  blob.writeUInt16BE(FLAG.migrationData, 4);
  blob.writeUInt32BE(length, 6);
  blob.writeUInt16BE(TAG.migrationData, HEADER_BYTES);
  blob.writeUInt32BE(ITEM_BYTES + state.length, HEADER_BYTES + 2);
  blob.writeUInt16BE(TAG.data, HEADER_BYTES + ITEM_BYTES);
  blob.writeUInt32BE(state.length, HEADER_BYTES + ITEM_BYTES + 2);
  blob.set(state, HEADER_BYTES + 2 * ITEM_BYTES);
  return blob;
}

/**
 * Takes swtpm's state files too, whose DATA is not within MIGRATION_DATA.
 * @returns libtpms's state, a view into `blob`
 * @throws VtpmdError `blob-malformed`, `blob-encrypted`, `newer-format`
 */
export function decodeBlob(type: StateBlobType, blob: Buffer): Buffer {
  if (blob.length > MAX_BLOB_BYTES)
    throw malformed(`has ${blob.length} bytes, at most ${MAX_BLOB_BYTES} are taken`);
  if (blob.length < HEADER_BYTES) throw malformed('is shorter than its header');
  if (blob.readUInt32BE(6) !== blob.length) throw malformed('has another length than it says');
  const least = blob.readUInt8(1);
  if (least > VERSION) {
    throw new VtpmdError(
      'newer-format',
      `the state blob needs a reader of format ${least}, this one knows ${VERSION}`,
    );
  }
  // Format 1 had no items.
  if (blob.readUInt8(0) < VERSION) throw malformed('is of a format before 2');
  const headerLength = blob.readUInt16BE(2);
  if (headerLength < HEADER_BYTES || headerLength > blob.length)
    throw malformed('has a header of another length');
  if ((blob.readUInt16BE(4) & (FLAG.encrypted | FLAG.migrationEncrypted)) !== 0) throw encrypted();
  const outer = readItems(blob.subarray(headerLength));
  const migrated = outer.get(TAG.migrationData);
  const state = (migrated ? readItems(migrated) : outer).get(TAG.data);
  if (!state) throw malformed('holds no state');
  if (state.length < STATE_HEADER_BYTES || state.readUInt32BE(2) !== STATE_MAGIC[type]) {
    throw malformed(`is not the ${type} state of a TPM 2.0`);
  }
  return state;
}

/** Items by their tags; those that are not known say nothing to this version, by the header's word. */
function readItems(bytes: Buffer): Map<number, Buffer> {
  const items = new Map<number, Buffer>();
  for (let at = 0; at < bytes.length; ) {
    if (bytes.length - at < ITEM_BYTES) throw malformed('ends within an item');
    const tag = bytes.readUInt16BE(at);
    const end = at + ITEM_BYTES + bytes.readUInt32BE(at + 2);
    if (end > bytes.length) throw malformed('ends within an item');
    if (items.has(tag)) throw malformed('has an item twice');
    if (ENCRYPTED_TAGS.includes(tag)) throw encrypted();
    items.set(tag, bytes.subarray(at + ITEM_BYTES, end));
    at = end;
  }
  return items;
}

function malformed(what: string): VtpmdError {
  return new VtpmdError('blob-malformed', `the state blob ${what}`);
}

function encrypted(): VtpmdError {
  return new VtpmdError(
    'blob-encrypted',
    'the state blob is encrypted with a key of swtpm; take it out of a swtpm that has no --migration-key',
  );
}
