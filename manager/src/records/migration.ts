import {
  type Arrival,
  bytesEqual,
  type Departure,
  type RecordHeader,
  type SealedPart,
  type Stay,
} from 'vtpm-proto';
import { ManagerError } from '../error.js';
import { type KeyHierarchy, newDataKey, sealPart, wipe, wrapDataKey } from '../keys/index.js';
import { RECORD_FORMAT, type VtpmRecord } from './format.js';
import { contextOf, dataKeyNames, openDataKey, openState, wipeState } from './parts.js';
import {
  acceptedGeneration,
  type LoadFacts,
  newCheckpointKey,
  PART_LIMITS,
  tombstone,
  withMark,
  withoutSession,
} from './transitions.js';
import type { TravellingState } from './travelling.js';

const EMPTY = new Uint8Array(0);
const UUID_BYTES = 16;
const HOST_ID_BYTES = 32;
const REFERENCE_KEY_BYTES = 32;
const DIGEST_BYTES = 32;
/** Of a boot that never was: nobody has loaded it here. */
const NONE = Buffer.alloc(UUID_BYTES);
/** Of no migration: a host had it that did not send it. */
export const NO_MIGRATION = Buffer.alloc(UUID_BYTES);
/** Of an audit log that nobody could ask. */
export const NO_HEAD = Buffer.alloc(DIGEST_BYTES);

/** Hosts that are remembered: the first one, where the vTPM was made, and the newest. The audit logs have them all. */
export const MAX_STAYS = 32;
/** Sources that have not said that their tombstone is written; each is one host. */
export const MAX_UNSETTLED = 16;
const MAX_MARKS = 32;
const MAX_MARK_LENGTH = 64;
const MAX_VERSION_LENGTH = 64;

/** Nobody runs it here until its destination has said what it decided. */
export function isDeparting(
  header: RecordHeader,
): header is RecordHeader & { readonly departure: Departure } {
  return header.kind === 'LIVE' && header.departure !== undefined;
}

/** Its state is on its way: it has no session, and gets none. */
export function depart(
  record: VtpmRecord,
  { migrationId, destination, at, mode }: Omit<Departure, 'epoch' | 'generation'>,
): VtpmRecord & { readonly header: { readonly departure: Departure } } {
  const { header, parts } = withoutSession(record);
  const { epoch, generation } = header;
  return {
    header: { ...header, departure: { migrationId, destination, at, mode, epoch, generation } },
    parts,
  };
}

/** It lives here again. The epoch is another one, so that what ended this attempt never ends a later one. */
export function thawed(record: VtpmRecord): VtpmRecord {
  const { departure: _departure, ...header } = record.header;
  return { header: { ...header, epoch: header.epoch + 1n }, parts: record.parts };
}

/** What is known of a destination that is gone for good. */
export interface GoneDestination {
  /** Host id. */
  readonly host: Uint8Array;
  /** The newest generation that it may have had. */
  readonly lastGeneration: bigint;
  /** That it has had none of, nor will. */
  readonly epoch: bigint;
}

/**
 * It lives here again from where it was frozen, without the word of its destination, which may have run it: marked, at an
 * epoch and generation that nobody has had. What was left of the VM run but its frozen TPM is unreadable.
 * @param count what the TPM's counter shows once this is accepted
 */
export function takenBack(
  keys: KeyHierarchy,
  record: VtpmRecord,
  { host, lastGeneration, epoch }: GoneDestination,
  count: bigint,
): VtpmRecord {
  const { departure, ...held } = record.header;
  if (!departure) throw new ManagerError('internal', 'a vTPM that has not left is not taken back');
  const newest = lastGeneration > held.generation ? lastGeneration : held.generation;
  const unread = { auditHead: NO_HEAD, auditLength: 0n, lastEpoch: departure.epoch };
  const here: Stay = {
    ...unread,
    host: keys.hostKey.publicKey,
    lastGeneration: departure.generation,
    migrationId: departure.migrationId,
  };
  const there: Stay = { ...unread, host, lastGeneration, migrationId: NO_MIGRATION };
  const header: RecordHeader = {
    ...held,
    epoch,
    generation: acceptedGeneration(held.generation, newest, count),
    marks: withMark(held.marks, 'rescued'),
    lineage: withStay(withStay(held.lineage, here), there),
  };
  const dataKey = openDataKey(keys, header);
  try {
    return { header: { ...header, checkpointKey: newCheckpointKey(dataKey, header) }, parts: record.parts };
  } finally {
    wipe(dataKey);
  }
}

/**
 * The tombstone of a vTPM that lives elsewhere: it says where to, and at which epoch and generation it went.
 * @param departure in whose place the record's own is, where it left by itself
 */
export function movedAway(record: VtpmRecord, departure: Departure, now: bigint): VtpmRecord {
  const { header, parts } = tombstone(record, 'MOVED', now);
  const { epoch, generation } = departure;
  return { header: { ...header, epoch, generation, departure }, parts };
}

/** Who sends it, and what becomes part of its history. */
export type StayHere = Pick<Stay, 'host' | 'auditHead' | 'auditLength' | 'migrationId'>;

/** What leaves, in the clear; the caller wipes its parts. @throws ManagerError `store-corrupt` */
export function travelling(keys: KeyHierarchy, record: VtpmRecord, stay: StayHere): TravellingState {
  const { header } = record;
  const { epoch, generation, suspension } = header;
  const state = openState(keys, record);
  const { permanent, volatile, referenceKey } = state;
  if (!permanent || (suspension !== undefined) !== (volatile !== undefined)) {
    wipeState(state);
    throw new ManagerError('store-corrupt', 'the record has not the parts that it speaks of');
  }
  wipe(state.checkpointKey);
  return {
    header: {
      vmUuid: header.vmUuid,
      vmRunId: header.vmRunId,
      epoch,
      generation,
      libtpmsVersion: header.libtpmsVersion,
      marks: header.marks,
      createdAt: header.createdAt,
      savedAt: header.savedAt,
      referenceDigest: suspension?.referenceDigest ?? EMPTY,
      suspendedGeneration: suspension?.generation ?? 0n,
      lineage: withStay(header.lineage, { ...stay, lastEpoch: epoch, lastGeneration: generation }),
      auditHead: stay.auditHead,
      auditLength: stay.auditLength,
    },
    parts: {
      PERMANENT: permanent,
      ...(volatile && { VOLATILE: volatile }),
      REFERENCE_KEY: referenceKey,
    },
  };
}

/** The past of one that has lived at one more place: the first of them, and the newest. */
export function withStay(lineage: readonly Stay[], stay: Stay): Stay[] {
  const [first, ...others] = lineage;
  return first ? [first, ...others.slice(2 - MAX_STAYS), stay] : [stay];
}

/** Under which names it comes. */
export interface ArrivalNames {
  readonly vtpmUuid: Uint8Array;
  readonly migrationId: Uint8Array;
  /** Host id of the source. */
  readonly source: Uint8Array;
}

/**
 * The record of a vTPM that lives here from now on, under a data key of its own. Its generation goes on, its epoch is the
 * next one.
 * @param held the tombstone of when it left here
 * @param load of the worker that waits; undefined where nobody does
 * @throws ManagerError `incomplete`, `too-large`, `bad-request`
 */
export function arrive(
  keys: KeyHierarchy,
  names: ArrivalNames,
  {
    header: came,
    parts: { PERMANENT: permanent, VOLATILE: volatile, REFERENCE_KEY: reference },
  }: TravellingState,
  held: RecordHeader | undefined,
  load: LoadFacts | undefined,
): VtpmRecord {
  if (!permanent || !reference) throw incomplete('the permanent state or the key of references is missing');
  const { keyId, storeKey } = keys.current;
  const { storeId } = keys;
  const dataKey = newDataKey();
  try {
    const { vtpmUuid, migrationId, source } = names;
    const isSuspended = came.referenceDigest.length > 0;
    const arrival: Arrival = { migrationId, source, epoch: came.epoch, generation: came.generation };
    const header: RecordHeader = {
      format: RECORD_FORMAT,
      kind: 'LIVE',
      storeId,
      vtpmUuid,
      vmUuid: came.vmUuid,
      vmRunId: load?.vmRunId ?? came.vmRunId,
      generation: came.generation,
      epoch: came.epoch + 1n,
      keyId,
      wrappedDataKey: wrapDataKey(storeKey, dataKey, dataKeyNames({ keyId, storeId, vtpmUuid })),
      ...(load && { session: load.session }),
      libtpmsVersion: came.libtpmsVersion,
      bootId: load?.bootId ?? NONE,
      marks: [...new Set([...(held?.marks ?? []), ...came.marks])],
      savedAt: came.savedAt,
      createdAt: came.createdAt,
      ...(isSuspended && {
        suspension: {
          vmRunId: came.vmRunId,
          referenceDigest: came.referenceDigest,
          generation: came.suspendedGeneration,
        },
      }),
      // A source that sends it has it: what it once asked of an earlier time is answered.
      unsettled: [...(held?.unsettled ?? []).filter((other) => !bytesEqual(other.source, source)), arrival],
      lineage: came.lineage,
      // Hosts that were dead when it was here may be so still.
      rescues: held?.rescues ?? [],
    };
    const seal = (kind: 'PERMANENT' | 'VOLATILE' | 'REFERENCE_KEY', plain: Uint8Array): SealedPart =>
      sealPart(dataKey, contextOf(header, kind), plain);
    return {
      header: {
        ...header,
        checkpointKey: newCheckpointKey(dataKey, header),
        referenceKey: seal('REFERENCE_KEY', reference),
      },
      parts: [seal('PERMANENT', permanent), ...(volatile ? [seal('VOLATILE', volatile)] : [])],
    };
  } finally {
    wipe(dataKey);
  }
}

/** The source's tombstone is written. */
export function settled(record: VtpmRecord, migrationId: Uint8Array): VtpmRecord {
  const unsettled = record.header.unsettled.filter(
    (arrival) => !bytesEqual(arrival.migrationId, migrationId),
  );
  return { ...record, header: { ...record.header, unsettled } };
}

/**
 * Whether what came is one vTPM, whole, from where it says.
 * @throws ManagerError `incomplete`, `too-large`, `bad-request`
 */
export function checkTravelling(
  { migrationId, source }: ArrivalNames,
  { header, parts }: TravellingState,
): void {
  const { PERMANENT: permanent, VOLATILE: volatile, REFERENCE_KEY: reference } = parts;
  if (!permanent || permanent.length === 0 || header.generation === 0n) {
    throw incomplete('the permanent state is missing');
  }
  if (reference?.length !== REFERENCE_KEY_BYTES) throw incomplete('the key of references is missing');
  if (permanent.length > PART_LIMITS.permanent || (volatile?.length ?? 0) > PART_LIMITS.volatile) {
    throw new ManagerError('too-large', 'what came is larger than the state of a TPM can be');
  }
  const digestBytes = header.referenceDigest.length;
  if (digestBytes !== 0 && digestBytes !== DIGEST_BYTES) throw unfit('the digest of its reference');
  if (digestBytes > 0 !== (volatile?.length ?? 0) > 0) {
    throw incomplete('a suspended TPM has volatile state, and no other has');
  }
  if (header.suspendedGeneration > header.generation) throw unfit('when it was suspended');
  if (header.vmUuid.length !== UUID_BYTES || header.vmRunId.length !== UUID_BYTES) throw unfit('its VM');
  if (header.libtpmsVersion.length > MAX_VERSION_LENGTH) throw unfit('its version of libtpms');
  if (header.marks.length > MAX_MARKS || header.marks.some((mark) => mark.length > MAX_MARK_LENGTH)) {
    throw unfit('its marks');
  }
  checkLineage(header.lineage, migrationId, source);
}

function checkLineage(lineage: readonly Stay[], migrationId: Uint8Array, source: Uint8Array): void {
  const isWhole =
    lineage.length <= MAX_STAYS &&
    lineage.every(
      (stay) =>
        stay.host.length === HOST_ID_BYTES &&
        stay.migrationId.length === UUID_BYTES &&
        stay.auditHead.length === DIGEST_BYTES,
    );
  const last = lineage.at(-1);
  if (!isWhole || !last || !bytesEqual(last.host, source) || !bytesEqual(last.migrationId, migrationId)) {
    throw unfit('where it lived');
  }
}

function incomplete(what: string): ManagerError {
  return new ManagerError('incomplete', `the state that came is not whole: ${what}; nothing was taken over`);
}

function unfit(what: string): ManagerError {
  return new ManagerError('bad-request', `what came says of itself what cannot be: ${what}`);
}
