import { decode, type PartContext, type PartKind, type RecordHeader, type SealedPart } from 'vtpm-proto';
import {
  type DataKeyNames,
  type KeyHierarchy,
  openPart,
  sealPart,
  unwrapDataKey,
  wipe,
} from '../keys/index.js';
import type { VtpmRecord } from './format.js';

/** Of sealed parts and wrapped data keys: they stay as they are where a header comes to say more. */
const PART_FORMAT = 1;

const EMPTY = new Uint8Array(0);

/** What a part of the record says of itself. */
export function contextOf(header: RecordHeader, kind: PartKind): Omit<PartContext, 'length'> {
  return {
    format: PART_FORMAT,
    kind,
    keyId: header.keyId,
    storeId: header.storeId,
    vtpmUuid: header.vtpmUuid,
    vmUuid: header.vmUuid,
    vmRunId: vmRunOf(header, kind),
    generation: header.generation,
    epoch: header.epoch,
    libtpmsVersion: header.libtpmsVersion,
  };
}

function vmRunOf(header: RecordHeader, kind: PartKind): Uint8Array {
  if (kind === 'PERMANENT' || kind === 'REFERENCE_KEY') return EMPTY;
  return kind === 'VOLATILE' && header.suspension ? header.suspension.vmRunId : header.vmRunId;
}

export function ofKind(parts: readonly SealedPart[], kind: PartKind): SealedPart[] {
  return parts.filter((part) => kindOf(part) === kind);
}

export function kindOf(part: SealedPart): PartKind {
  return decode('PartContext', part.context).kind;
}

/** What the data key of a record is bound to. */
export function dataKeyNames({
  keyId,
  storeId,
  vtpmUuid,
}: Pick<RecordHeader, 'keyId' | 'storeId' | 'vtpmUuid'>): DataKeyNames {
  return { format: PART_FORMAT, keyId, storeId, vtpmUuid };
}

/** The caller wipes it. */
export function openDataKey(keys: KeyHierarchy, header: RecordHeader): Buffer {
  const { storeKey } = keys.ofGeneration(header.keyId, 'a record');
  return unwrapDataKey(storeKey, header.wrappedDataKey, dataKeyNames(header));
}

/** The same content under another data key, in another record of the vTPM. */
export function reseal(
  oldKey: Uint8Array,
  oldHeader: RecordHeader,
  part: SealedPart,
  dataKey: Uint8Array,
  header: RecordHeader,
): SealedPart {
  const { kind, generation, epoch, libtpmsVersion } = decode('PartContext', part.context);
  const plain = openPart(oldKey, part, contextOf(oldHeader, kind));
  try {
    return sealPart(dataKey, { ...contextOf(header, kind), generation, epoch, libtpmsVersion }, plain);
  } finally {
    wipe(plain);
  }
}

/** What a record holds, in the clear; the caller wipes it. */
export interface OpenedState {
  readonly permanent: Buffer | undefined;
  readonly volatile: Buffer | undefined;
  /** Of the VM run that the record is at. */
  readonly checkpointKey: Buffer | undefined;
  /** Authenticates references to its state, wherever they were given out. */
  readonly referenceKey: Buffer;
}

export function openState(keys: KeyHierarchy, record: VtpmRecord): OpenedState {
  const { header, parts } = record;
  const { checkpointKey, referenceKey } = header;
  const dataKey = openDataKey(keys, header);
  try {
    const open = (part: SealedPart | undefined, kind: PartKind): Buffer | undefined =>
      part && openPart(dataKey, part, contextOf(header, kind));
    return {
      permanent: open(ofKind(parts, 'PERMANENT')[0], 'PERMANENT'),
      volatile: open(ofKind(parts, 'VOLATILE')[0], 'VOLATILE'),
      checkpointKey: open(checkpointKey, 'CHECKPOINT_KEY'),
      referenceKey: open(referenceKey, 'REFERENCE_KEY') ?? keys.referenceKey(header.vtpmUuid),
    };
  } finally {
    wipe(dataKey);
  }
}

export function wipeState({ permanent, volatile, checkpointKey, referenceKey }: OpenedState): void {
  wipe(permanent, volatile, checkpointKey, referenceKey);
}

/** Bytes of the sealed parts. */
export function savedBytes(record: VtpmRecord): number {
  return record.parts.reduce((sum, part) => sum + part.sealed.length, 0);
}
