import { randomBytes } from 'node:crypto';
import {
  bytesEqual,
  encode,
  type PartKind,
  type RecordHeader,
  type SaveBody,
  type SealedPart,
  type Session,
  type StateAction,
} from 'vtpm-proto';
import { ManagerError } from '../error.js';
import { type KeyHierarchy, newDataKey, sealPart, wipe, wrapDataKey } from '../keys/index.js';
import { FIRST_FORMAT, type VtpmRecord } from './format.js';
import { contextOf, dataKeyNames, kindOf, ofKind, openDataKey, reseal } from './parts.js';

const EMPTY = new Uint8Array(0);
const CHECKPOINT_KEY_BYTES = 32;

/** Sizes a save may have, in bytes. libtpms's largest permanent state is 143 KB, its volatile state 11 KB. */
export const PART_LIMITS = { permanent: 256 * 1024, volatile: 64 * 1024, journal: 64 * 1024 } as const;

/** What a Load brings into the record. */
export interface LoadFacts {
  readonly vmRunId: Uint8Array;
  readonly bootId: Uint8Array;
  readonly session: Session;
  readonly libtpmsVersion: string;
  /** False for a power-on: the checkpoint key and a suspended TPM are dropped for good. */
  readonly keepsVolatile: boolean;
}

/** The record of a vTPM's first Load: epoch 1, generation 0, a data key and no state. */
export function newRecord(
  keys: KeyHierarchy,
  names: { readonly vtpmUuid: Uint8Array; readonly vmUuid: Uint8Array },
  load: LoadFacts,
  now: bigint,
): VtpmRecord {
  const dataKey = newDataKey();
  const { keyId, storeKey } = keys.current;
  const { storeId } = keys;
  const { vtpmUuid } = names;
  const wrappedDataKey = wrapDataKey(storeKey, dataKey, dataKeyNames({ keyId, storeId, vtpmUuid }));
  const header: RecordHeader = {
    format: FIRST_FORMAT,
    kind: 'LIVE',
    storeId,
    vtpmUuid,
    vmUuid: names.vmUuid,
    vmRunId: load.vmRunId,
    generation: 0n,
    epoch: 1n,
    keyId,
    wrappedDataKey,
    session: load.session,
    libtpmsVersion: load.libtpmsVersion,
    bootId: load.bootId,
    marks: [],
    savedAt: 0n,
    createdAt: now,
    unsettled: [],
    lineage: [],
    rescues: [],
  };
  const checkpointKey = newCheckpointKey(dataKey, header);
  wipe(dataKey);
  return { header: { ...header, checkpointKey }, parts: [] };
}

/**
 * The next epoch, owned by a new session. A new VM run gets a new checkpoint key: what the last one left is unreadable. A
 * suspended TPM waits over VM runs, until one of them uses or ends it.
 */
export function applyLoad(keys: KeyHierarchy, record: VtpmRecord, load: LoadFacts): VtpmRecord {
  const goesOn = bytesEqual(record.header.vmRunId, load.vmRunId) && load.keepsVolatile;
  const kept = load.keepsVolatile ? record : withoutSuspension(record);
  const header: RecordHeader = {
    ...kept.header,
    vmRunId: load.vmRunId,
    bootId: load.bootId,
    epoch: record.header.epoch + 1n,
    session: load.session,
  };
  if (goesOn) return { header, parts: kept.parts };
  const dataKey = openDataKey(keys, header);
  try {
    const checkpointKey = newCheckpointKey(dataKey, header);
    const suspended = header.suspension ? ofKind(kept.parts, 'VOLATILE') : [];
    return {
      header: { ...header, checkpointKey },
      parts: [...ofKind(kept.parts, 'PERMANENT'), ...suspended],
    };
  } finally {
    wipe(dataKey);
  }
}

export function newCheckpointKey(dataKey: Uint8Array, header: RecordHeader): SealedPart {
  const key = randomBytes(CHECKPOINT_KEY_BYTES);
  try {
    return sealPart(dataKey, contextOf(header, 'CHECKPOINT_KEY'), key);
  } finally {
    wipe(key);
  }
}

/** The next generation: the parts of one save become one record. */
export function applySave(
  keys: KeyHierarchy,
  record: VtpmRecord,
  save: {
    readonly body: SaveBody;
    readonly sequence: bigint;
    readonly digest: Uint8Array;
    readonly now: bigint;
  },
): VtpmRecord {
  const { session } = record.header;
  if (!session) throw new ManagerError('fenced', 'the vTPM has no session');
  const { use, libtpmsVersion } = save.body;
  const generation = record.header.generation + 1n;
  const { vmRunId } = record.header;
  const header: RecordHeader = {
    ...withoutSuspension(record).header,
    generation,
    session: { ...session, lastSequence: save.sequence, lastDigest: save.digest },
    libtpmsVersion,
    savedAt: save.now,
    ...(use?.action === 'SUSPEND' && {
      // A copy: the save is wiped.
      suspension: { vmRunId, referenceDigest: Buffer.from(use.digest), generation },
    }),
    marks: marksAfter(record.header.marks, use?.action),
  };
  const dataKey = openDataKey(keys, record.header);
  try {
    return { header, parts: partsAfter(dataKey, header, record.parts, save.body) };
  } finally {
    wipe(dataKey);
  }
}

/** The TPM is not suspended any more: what was given out of it is worthless. */
function withoutSuspension(record: VtpmRecord): VtpmRecord {
  const { suspension: _suspension, ...header } = record.header;
  return { header, parts: record.parts.filter((part) => kindOf(part) === 'PERMANENT') };
}

/** The session is over; nobody saves until the next Load. */
export function withoutSession(record: VtpmRecord): VtpmRecord {
  const { session: _session, ...header } = record.header;
  return { ...record, header };
}

/** The tombstone: data key and state are gone, generation and epoch stay to be compared with. */
export function retire(record: VtpmRecord, now: bigint): VtpmRecord {
  return tombstone(record, 'RETIRED', now);
}

/** @param kind of one that had moved before, its state has been on old disks since then */
export function tombstone(record: VtpmRecord, kind: 'RETIRED' | 'MOVED', now: bigint): VtpmRecord {
  const {
    checkpointKey: _checkpointKey,
    referenceKey: _referenceKey,
    ...header
  } = withoutSuspension(withoutSession(record)).header;
  const retirement = header.retirement ?? { keyId: header.keyId, at: now };
  return { header: { ...header, kind, wrappedDataKey: EMPTY, retirement }, parts: [] };
}

/** What an operator must see of a vTPM for ever. */
export type Mark = 'rolled-back' | 'recovered' | 'restored' | 'rescued' | 'plain-export';

/** What is brought in from outside may be any state of the past. */
const MARK_OF: Readonly<Partial<Record<StateAction, Mark>>> = {
  EXPORT: 'plain-export',
  IMPORT: 'rolled-back',
};

function marksAfter(marks: readonly string[], action: StateAction | undefined): string[] {
  const mark = action && MARK_OF[action];
  return mark === undefined ? [...marks] : withMark(marks, mark);
}

export function withMark(marks: readonly string[], mark: Mark): string[] {
  return marks.includes(mark) ? [...marks] : [...marks, mark];
}

/**
 * Of an old state nobody knows how many saves came after it. So the upper half of a generation says at which count of the
 * TPM an old state was last accepted (0: never), the lower one counts saves: two that go on from the same copy differ.
 */
export const ACCEPTANCE = 1n << 32n;

/**
 * An old state goes on as the newest: marked, owned by nobody, at a generation that was never used.
 * @param count what the TPM's counter shows once this is accepted
 */
export function resume(record: VtpmRecord, mark: Mark, count: bigint): VtpmRecord {
  const { header: withKey, parts } = withoutSuspension(withoutSession(record));
  // No worker goes on from a checkpoint of a state that was left behind, and no reference to one is good any more.
  const { checkpointKey: _key, ...header } = withKey;
  const generation = acceptedGeneration(header.generation, header.generation, count);
  const marks = withMark(header.marks, mark);
  return { header: { ...header, generation, epoch: header.epoch + 1n, marks }, parts };
}

/**
 * The generation at which an old state goes on: nobody has had it.
 * @param generation of that state
 * @param newest that is known
 * @param count what the TPM's counter shows once this is accepted
 */
export function acceptedGeneration(generation: bigint, newest: bigint, count: bigint): bigint {
  const last = newest / ACCEPTANCE;
  // On another TPM the count may be lower.
  const accepted = count > last ? count : last + 1n;
  return accepted * ACCEPTANCE + (generation % ACCEPTANCE);
}

/**
 * The same record under the current generation of the root key: state under a new data key, that one wrapped anew.
 * A tombstone has neither and is only authenticated anew.
 */
export function rekey(keys: KeyHierarchy, record: VtpmRecord): VtpmRecord {
  const { keyId, storeKey } = keys.current;
  if (record.header.kind !== 'LIVE') return { ...record, header: { ...record.header, keyId } };
  const oldKey = openDataKey(keys, record.header);
  const dataKey = newDataKey();
  try {
    const names = dataKeyNames({ ...record.header, keyId });
    const wrappedDataKey = wrapDataKey(storeKey, dataKey, names);
    const header: RecordHeader = { ...record.header, keyId, wrappedDataKey };
    const resealed = (part: SealedPart): SealedPart => reseal(oldKey, record.header, part, dataKey, header);
    const { checkpointKey, referenceKey } = record.header;
    return {
      header: {
        ...header,
        ...(checkpointKey && { checkpointKey: resealed(checkpointKey) }),
        ...(referenceKey && { referenceKey: resealed(referenceKey) }),
      },
      parts: record.parts.map(resealed),
    };
  } finally {
    wipe(oldKey, dataKey);
  }
}

/**
 * A part that the save brings replaces the old one. Without a permanent part the old one stays. A volatile part is that of
 * the TPM at this very save: no other save keeps it.
 */
function partsAfter(
  dataKey: Uint8Array,
  header: RecordHeader,
  old: readonly SealedPart[],
  body: SaveBody,
): SealedPart[] {
  const seal = (kind: PartKind, plain: Uint8Array): SealedPart[] => [
    sealPart(dataKey, contextOf(header, kind), plain),
  ];
  const { permanent, volatile, journal } = body;
  return [
    ...(permanent ? seal('PERMANENT', permanent) : ofKind(old, 'PERMANENT')),
    ...(volatile ? seal('VOLATILE', volatile) : []),
    ...(journal ? seal('JOURNAL', encode('Journal', journal)) : []),
  ];
}
