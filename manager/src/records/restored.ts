import type { RecordHeader } from 'vtpm-proto';
import { type KeyHierarchy, newDataKey, sealPart, wipe, wrapDataKey } from '../keys/index.js';
import { FIRST_FORMAT, type VtpmRecord } from './format.js';
import { contextOf, dataKeyNames } from './parts.js';
import { ACCEPTANCE, type Mark, resume } from './transitions.js';

/** What a copy of a vTPM, made earlier, says of it. */
export type CopyFacts = Pick<
  RecordHeader,
  | 'vtpmUuid'
  | 'vmUuid'
  | 'kind'
  | 'generation'
  | 'epoch'
  | 'marks'
  | 'libtpmsVersion'
  | 'savedAt'
  | 'createdAt'
> &
  Partial<Pick<RecordHeader, 'departure' | 'unsettled' | 'lineage'>>;

/** What there was in its place, and what others are to hear of it still. */
type Held = Pick<RecordHeader, 'generation' | 'epoch' | 'marks' | 'unsettled' | 'lineage' | 'rescues'>;

const EMPTY = new Uint8Array(0);
/** Of a VM run and a boot that never were: a restored vTPM is powered on. */
const NONE = Buffer.alloc(16);

/**
 * The record of a vTPM that goes on from a copy: marked, owned by nobody, its permanent state under a new data key, and at
 * a generation and epoch that neither the copy nor the record in its place has had.
 * @param permanent state; the caller wipes it
 * @param count what the TPM's counter shows once this is accepted
 * @param mark that it bears for ever
 */
export function restoredRecord(
  keys: KeyHierarchy,
  copy: CopyFacts,
  permanent: Uint8Array,
  held: Held | undefined,
  count: bigint,
  mark: Mark = 'restored',
): VtpmRecord {
  const { header } = resume({ header: headerOf(keys, copy, held), parts: [] }, mark, count);
  const { keyId, storeKey } = keys.current;
  const dataKey = newDataKey();
  try {
    const wrappedDataKey = wrapDataKey(storeKey, dataKey, dataKeyNames({ ...header, keyId }));
    return {
      header: { ...header, wrappedDataKey },
      parts: [sealPart(dataKey, contextOf(header, 'PERMANENT'), permanent)],
    };
  } finally {
    wipe(dataKey);
  }
}

/** The tombstone that a copy says there was. */
export function restoredTombstone(keys: KeyHierarchy, copy: CopyFacts): VtpmRecord {
  return { header: headerOf(keys, copy, undefined), parts: [] };
}

function headerOf(keys: KeyHierarchy, copy: CopyFacts, held: Held | undefined): RecordHeader {
  const { vtpmUuid, vmUuid, kind, libtpmsVersion, savedAt, createdAt } = copy;
  const { departure, unsettled = [], lineage = [] } = copy;
  const accepted = max(copy.generation, held?.generation) / ACCEPTANCE;
  return {
    format: FIRST_FORMAT,
    kind,
    storeId: keys.storeId,
    vtpmUuid,
    vmUuid,
    vmRunId: NONE,
    generation: accepted * ACCEPTANCE + (copy.generation % ACCEPTANCE),
    epoch: max(copy.epoch, held?.epoch),
    keyId: keys.current.keyId,
    wrappedDataKey: EMPTY,
    libtpmsVersion,
    bootId: NONE,
    marks: [...new Set([...(held?.marks ?? []), ...copy.marks])],
    savedAt,
    createdAt,
    // Where there is a record, what came after the copy is in it, and it is not on its way any more.
    ...(departure && !held && { departure }),
    unsettled: held?.unsettled ?? unsettled,
    lineage: held?.lineage ?? lineage,
    rescues: held?.rescues ?? [],
  };
}

function max(a: bigint, b = 0n): bigint {
  return a > b ? a : b;
}
