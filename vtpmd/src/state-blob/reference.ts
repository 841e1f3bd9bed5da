import { createHmac, hash, timingSafeEqual } from 'node:crypto';
import { bytesEqual } from 'vtpm-proto';
import { VtpmdError } from '../error.js';
import type { StateBlobType } from './state-blobs.js';

/**
 * What a VMM gets in the place of a TPM's state: magic (16), u32 format, u32 type, manager (32), vTPM (16), u64 generation,
 * reference (32), HMAC-SHA256 under the vTPM's reference key over all of that (32). Big-endian.
 *
 * The second byte of the magic stands where swtpm's blobs name the least version of a reader: it refuses one of these by name.
 */
const MAGIC = Buffer.from('vtpm.v1 stateref');
const FORMAT = 1;
const AT = { format: 16, type: 20, manager: 24, vtpm: 56, generation: 72, reference: 80, mac: 112 } as const;
const TOTAL_BYTES = 144;

const TYPE: Readonly<Record<StateBlobType, number>> = { permanent: 1, volatile: 2, savestate: 3 };

/** Whose TPM a reference is to. */
export interface ReferenceNames {
  /** The manager's public key, 32 bytes. */
  readonly managerKey: Uint8Array;
  /** 16 bytes. */
  readonly vtpmUuid: Uint8Array;
}

/** The suspended state that there is. */
export interface ReferredState {
  readonly generation: bigint;
  /** 32 bytes. */
  readonly reference: Uint8Array;
}

/** As the record of the vTPM has it, 32 bytes. */
export function referenceDigest(reference: Uint8Array): Buffer {
  return hash('sha256', reference, 'buffer');
}

export function isReference(blob: Buffer): boolean {
  return blob.subarray(0, MAGIC.length).equals(MAGIC);
}

/** @param key the vTPM's reference key, 32 bytes */
export function encodeReference(
  key: Uint8Array,
  names: ReferenceNames,
  type: StateBlobType,
  { generation, reference }: ReferredState,
): Buffer {
  const blob = Buffer.alloc(TOTAL_BYTES);
  blob.set(MAGIC, 0);
  blob.writeUInt32BE(FORMAT, AT.format);
  blob.writeUInt32BE(TYPE[type], AT.type);
  blob.set(names.managerKey, AT.manager);
  blob.set(names.vtpmUuid, AT.vtpm);
  blob.writeBigUInt64BE(generation, AT.generation);
  blob.set(reference, AT.reference);
  blob.set(macOf(key, blob), AT.mac);
  return blob;
}

/**
 * What a blob says, where there is no key yet to check it with.
 * @returns the reference, 32 bytes
 * @throws VtpmdError `newer-format`, `blob-malformed`
 */
export function readReference(type: StateBlobType, blob: Buffer): Buffer {
  checkShape(blob);
  checkType(type, blob);
  return Buffer.from(blob.subarray(AT.reference, AT.mac));
}

/**
 * The name of the manager says only who may have the key: a vTPM that moves takes its key along.
 * @param state what is suspended now
 * @throws VtpmdError `newer-format`, `blob-malformed`, `reference-foreign`, `reference-used`
 */
export function checkReference(
  key: Uint8Array,
  names: ReferenceNames,
  type: StateBlobType,
  state: ReferredState | undefined,
  blob: Buffer,
): void {
  checkShape(blob);
  const isOf = (at: number, name: Uint8Array): boolean =>
    bytesEqual(blob.subarray(at, at + name.length), name);
  if (!isOf(AT.vtpm, names.vtpmUuid)) {
    throw new VtpmdError('reference-foreign', 'the reference is to the state of another vTPM');
  }
  if (!timingSafeEqual(blob.subarray(AT.mac), macOf(key, blob))) {
    if (!isOf(AT.manager, names.managerKey)) {
      throw new VtpmdError('reference-foreign', 'the reference is to a state that another manager keeps');
    }
    throw new VtpmdError('blob-malformed', 'the reference was changed: it does not authenticate');
  }
  checkType(type, blob);
  const generation = blob.readBigUInt64BE(AT.generation);
  if (!state || state.generation !== generation || !isOf(AT.reference, state.reference)) {
    throw new VtpmdError(
      'reference-used',
      `the reference to generation ${generation} was used, or the TPM went on after it was given out; a reference works once`,
    );
  }
}

function checkShape(blob: Buffer): void {
  if (blob.length >= AT.type && blob.readUInt32BE(AT.format) > FORMAT) {
    throw new VtpmdError(
      'newer-format',
      `the reference has format ${blob.readUInt32BE(AT.format)}, this version knows ${FORMAT}; use the version that made it`,
    );
  }
  if (blob.length !== TOTAL_BYTES) {
    throw new VtpmdError('blob-malformed', `the reference has ${blob.length} bytes, not ${TOTAL_BYTES}`);
  }
}

function checkType(type: StateBlobType, blob: Buffer): void {
  if (blob.readUInt32BE(AT.type) === TYPE[type]) return;
  throw new VtpmdError('blob-malformed', `the reference is not that to the ${type} state`);
}

function macOf(key: Uint8Array, blob: Buffer): Buffer {
  return createHmac('sha256', key).update(blob.subarray(0, AT.mac)).digest();
}
