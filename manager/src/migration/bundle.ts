import { createCipheriv, createDecipheriv } from 'node:crypto';
import {
  type BundleHeader,
  bytesEqual,
  decode,
  encode,
  expectLength,
  ProtoError,
  publicRandom,
  type SealedStatePart,
  type StateBundle,
} from 'vtpm-proto';
import { ManagerError } from '../error.js';
import { NONCE_BYTES, TAG_BYTES } from '../keys/aead.js';
import { secretBuffer, wipe } from '../keys/index.js';
import { PART_LIMITS } from '../records/index.js';
import { macsEqual, PART_ORDER, type StateKeys, type TravellingPart } from './state-key.js';

/** Format number of what travels; a newer one is refused by name. */
export const BUNDLE_FORMAT = 1;

/** Of the plaintexts, in bytes. */
const MOST_BYTES: Readonly<Record<TravellingPart, number>> = {
  PERMANENT: PART_LIMITS.permanent,
  VOLATILE: PART_LIMITS.volatile,
  REFERENCE_KEY: 32,
};

/** Of the header's lists: what is above is not history but a flood. */
export const HEADER_LIMITS = {
  marks: 32,
  markLength: 64,
  stays: 4096,
  auditLines: 64,
  auditLineLength: 4096,
  versionLength: 64,
} as const;

/** The largest state there is, with what is around it. */
export const MAX_STATE_BYTES = MOST_BYTES.PERMANENT + MOST_BYTES.VOLATILE + MOST_BYTES.REFERENCE_KEY;

/** In the clear; whoever holds it wipes it. */
export type StateParts = Readonly<Partial<Record<TravellingPart, Uint8Array>>>;

/** What the destination knows of the state before it comes. */
export interface ExpectedState {
  /** 32 bytes that it made for this session. */
  readonly identifier: Uint8Array;
  readonly migrationId: Uint8Array;
  readonly vtpmUuid: Uint8Array;
  readonly vmUuid: Uint8Array;
  readonly epoch: bigint;
  readonly leastGeneration: bigint;
  /** Kinds that must be there, and those that may. */
  readonly required: readonly TravellingPart[];
  readonly allowed: readonly TravellingPart[];
}

/** @returns a serialised StateBundle */
export function sealBundle(keys: StateKeys, header: Omit<BundleHeader, 'parts'>, parts: StateParts): Buffer {
  const kinds = PART_ORDER.filter((kind) => parts[kind] !== undefined);
  const names = { ...header, count: kinds.length };
  const sealed = kinds.map((kind, index) =>
    sealPart(keys, { ...names, kind, index }, parts[kind] ?? new Uint8Array(0)),
  );
  const bytes = encode('BundleHeader', { ...header, parts: kinds.length });
  return encode('StateBundle', {
    header: bytes,
    parts: sealed,
    completeness: keys.completeness(pieces(bytes, sealed)),
  });
}

/**
 * Parses, then holds everything against what is expected, then opens: nothing of a state that is not whole comes out.
 * @returns header and parts; the caller wipes the parts
 * @throws ManagerError `bad-request`; `newer-format`; `too-large`; `wrong-identifier`: of another session; `wrong-vm`: of
 * another vTPM or VM; `stale-epoch`; `rollback-detected`; `incomplete`: a part is missing, doubled, in another place, cut,
 * or was changed
 */
export function openBundle(
  keys: StateKeys,
  expected: ExpectedState,
  bytes: Uint8Array,
): { header: BundleHeader; parts: StateParts } {
  const { bundle, header } = parseBundle(bytes);
  checkNames(header, expected);
  checkLists(header);
  const kinds = checkParts(bundle, header, expected);
  if (!macsEqual(bundle.completeness, keys.completeness(pieces(bundle.header, bundle.parts)))) {
    throw incomplete('its completeness digest is not that of what came');
  }
  const opened: Partial<Record<TravellingPart, Uint8Array>> = {};
  try {
    for (const [index, part] of bundle.parts.entries()) {
      const kind = kinds[index] as TravellingPart;
      opened[kind] = openPart(keys, { ...header, kind, index, count: kinds.length }, part);
    }
  } catch (error) {
    wipe(...Object.values(opened));
    throw error;
  }
  return { header, parts: opened };
}

function parseBundle(bytes: Uint8Array): { bundle: StateBundle; header: BundleHeader } {
  try {
    const bundle = decode('StateBundle', bytes);
    const header = decode('BundleHeader', bundle.header);
    if (header.format > BUNDLE_FORMAT) {
      throw new ManagerError(
        'newer-format',
        `the state has format ${header.format}, this version knows ${BUNDLE_FORMAT}; upgrade the destination`,
      );
    }
    if (header.format !== BUNDLE_FORMAT) {
      throw new ManagerError('bad-request', `the state has format ${header.format}`);
    }
    for (const [what, field, length] of [
      ['migration id', header.migrationId, 16],
      ['identifier', header.identifier, 32],
      ['vTPM uuid', header.vtpmUuid, 16],
      ['VM uuid', header.vmUuid, 16],
      ['VM run id', header.vmRunId, 16],
      ['audit head', header.auditHead, 32],
    ] as const) {
      expectLength(what, field, length);
    }
    return { bundle, header };
  } catch (error) {
    if (!(error instanceof ProtoError)) throw error;
    throw new ManagerError('bad-request', `the state is not readable: ${error.message}`, { cause: error });
  }
}

function checkNames(header: BundleHeader, expected: ExpectedState): void {
  if (!bytesEqual(header.identifier, expected.identifier)) {
    throw new ManagerError(
      'wrong-identifier',
      'the state was made for another session than this one: a replay; migrate again',
    );
  }
  if (!bytesEqual(header.migrationId, expected.migrationId)) {
    throw new ManagerError('wrong-identifier', 'the state is of another migration; migrate again');
  }
  if (!bytesEqual(header.vtpmUuid, expected.vtpmUuid)) {
    throw new ManagerError('wrong-vm', 'the state is of another vTPM than was announced');
  }
  if (!bytesEqual(header.vmUuid, expected.vmUuid)) {
    throw new ManagerError('wrong-vm', 'the state belongs to another VM than was announced');
  }
  if (header.epoch !== expected.epoch) {
    throw new ManagerError(
      'stale-epoch',
      `the state is of epoch ${header.epoch}, epoch ${expected.epoch} was announced`,
    );
  }
  if (header.generation < expected.leastGeneration) {
    throw new ManagerError(
      'rollback-detected',
      `the state has generation ${header.generation}, ${expected.leastGeneration} was announced`,
    );
  }
}

function checkLists({ marks, lineage, auditTail, libtpmsVersion }: BundleHeader): void {
  const tooMany =
    marks.length > HEADER_LIMITS.marks ||
    marks.some((mark) => mark.length > HEADER_LIMITS.markLength) ||
    lineage.length > HEADER_LIMITS.stays ||
    auditTail.length > HEADER_LIMITS.auditLines ||
    auditTail.some((line) => line.length > HEADER_LIMITS.auditLineLength) ||
    libtpmsVersion.length > HEADER_LIMITS.versionLength;
  if (tooMany) throw new ManagerError('too-large', 'the header of the state is larger than any history is');
  for (const { host, auditHead, migrationId } of lineage) {
    if (host.length !== 32 || auditHead.length !== 32 || migrationId.length !== 16) {
      throw new ManagerError('bad-request', 'the lineage of the state is not readable');
    }
  }
}

/** @returns the kind of each part */
function checkParts(
  { parts }: StateBundle,
  header: BundleHeader,
  { required, allowed }: ExpectedState,
): TravellingPart[] {
  const kinds = parts.map(({ kind }) => {
    const known = PART_ORDER.find((name) => name === kind);
    if (!known || !allowed.includes(known)) throw incomplete(`it has a part "${kind.slice(0, 32)}"`);
    return known;
  });
  if (kinds.length !== header.parts) {
    throw incomplete(`${kinds.length} parts came, ${header.parts} were announced`);
  }
  for (const [i, kind] of kinds.entries()) {
    const before = kinds[i - 1];
    if (kinds.indexOf(kind) !== i) throw incomplete(`its ${name(kind)} part came twice`);
    if (before && PART_ORDER.indexOf(before) > PART_ORDER.indexOf(kind)) {
      throw incomplete(`its ${name(kind)} part came behind the ${name(before)} one`);
    }
  }
  const missing = required.find((kind) => !kinds.includes(kind));
  if (missing) throw incomplete(`its ${name(missing)} part is missing`);
  for (const [i, { sealed, nonce }] of parts.entries()) {
    const kind = kinds[i] as TravellingPart;
    if (sealed.length > MOST_BYTES[kind] + TAG_BYTES) {
      throw new ManagerError(
        'too-large',
        `the ${name(kind)} part has ${sealed.length} bytes, at most ${MOST_BYTES[kind]} are taken`,
      );
    }
    if (sealed.length <= TAG_BYTES || nonce.length !== NONCE_BYTES) {
      throw incomplete(`its ${name(kind)} part is cut`);
    }
    if (kind === 'REFERENCE_KEY' && sealed.length !== MOST_BYTES[kind] + TAG_BYTES) {
      throw incomplete(`its ${name(kind)} part is cut`);
    }
  }
  return kinds;
}

interface PartNames {
  readonly identifier: Uint8Array;
  readonly migrationId: Uint8Array;
  readonly vtpmUuid: Uint8Array;
  readonly kind: TravellingPart;
  readonly index: number;
  readonly count: number;
}

function sealPart(keys: StateKeys, names: PartNames, plain: Uint8Array): SealedStatePart {
  const nonce = publicRandom(NONCE_BYTES);
  const key = keys.part(names.kind);
  try {
    const cipher = createCipheriv('aes-256-gcm', key, nonce);
    cipher.setAAD(associatedData(names, plain.length));
    const sealed = Buffer.concat([cipher.update(plain), cipher.final(), cipher.getAuthTag()]);
    return { kind: names.kind, nonce, sealed };
  } finally {
    wipe(key);
  }
}

function openPart(keys: StateKeys, names: PartNames, { nonce, sealed }: SealedStatePart): Buffer {
  const length = sealed.length - TAG_BYTES;
  const key = keys.part(names.kind);
  const plain = secretBuffer(length);
  try {
    const decipher = createDecipheriv('aes-256-gcm', key, nonce, { authTagLength: TAG_BYTES });
    decipher.setAAD(associatedData(names, length));
    decipher.setAuthTag(sealed.subarray(length));
    const opened = decipher.update(sealed.subarray(0, length));
    plain.set(opened);
    wipe(opened);
    decipher.final();
    return plain;
  } catch (cause) {
    wipe(plain);
    throw incomplete(`its ${name(names.kind)} part does not authenticate`, cause);
  } finally {
    wipe(key);
  }
}

/**
 * "vtpm.v1 state part", identifier (32), migration id (16), vTPM uuid (16), place of the kind in PART_ORDER, index, count,
 * length (u32 each, big-endian): every item has a fixed length.
 */
function associatedData(names: PartNames, length: number): Buffer {
  const numbers = Buffer.alloc(16);
  numbers.writeUInt32BE(PART_ORDER.indexOf(names.kind), 0);
  numbers.writeUInt32BE(names.index, 4);
  numbers.writeUInt32BE(names.count, 8);
  numbers.writeUInt32BE(length, 12);
  return Buffer.concat([
    Buffer.from('vtpm.v1 state part\0'),
    names.identifier,
    names.migrationId,
    names.vtpmUuid,
    numbers,
  ]);
}

/** Header, then each part with its length: nothing can be shifted from one into another. */
function* pieces(header: Uint8Array, parts: readonly SealedStatePart[]): Generator<Uint8Array> {
  yield framed(header);
  for (const { kind, nonce, sealed } of parts) {
    yield framed(Buffer.from(kind));
    yield framed(nonce);
    yield framed(sealed);
  }
}

function framed(bytes: Uint8Array): Buffer {
  const length = Buffer.alloc(4);
  length.writeUInt32BE(bytes.length);
  return Buffer.concat([length, bytes]);
}

function name(kind: TravellingPart): string {
  return kind.toLowerCase().replace('_', ' ');
}

function incomplete(what: string, cause?: unknown): ManagerError {
  return new ManagerError(
    'incomplete',
    `the state is not whole: ${what}; nothing of it is used, migrate again`,
    cause === undefined ? {} : { cause },
  );
}
