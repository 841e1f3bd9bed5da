import { createHash, randomBytes } from 'node:crypto';
import { barrier, VERSION } from 'vtpm-common';
import { type BackupHeader, encode, uuidToBytes } from 'vtpm-proto';
import { ManagerError } from '../error.js';
import { type KeyHierarchy, sealEnvelope, wipe } from '../keys/index.js';
import { openState, type VtpmRecord, wipeState } from '../records/index.js';
import { entryMessage, envelopeNames, Frame, frame, preamble, sha256, trailerMessage } from './format.js';

export interface BackupSource {
  readonly keys: KeyHierarchy;
  /** In ascending order. */
  readonly ids: readonly string[];
  /** X25519 public key, 32 bytes. */
  readonly recipient: Uint8Array;
  readonly anchor: { readonly root: Uint8Array; readonly counter: bigint };
  /** The enrolment file. */
  readonly enrolment: Uint8Array;
  /** The approvals file. */
  readonly approvals: Uint8Array;
  readonly backupId: Uint8Array;
  /** A vTPM as it is durable when it is asked for. */
  record(id: string): Promise<VtpmRecord | undefined>;
}

/**
 * The bytes of a backup, one vTPM at a time: what is in memory does not grow with their number. Nothing is held up for
 * it: each vTPM is as it was saved last when its turn came.
 */
export async function* writeBackup(source: BackupSource): AsyncGenerator<Buffer> {
  const { keys, ids } = source;
  const digest = createHash('sha256');
  const begin = Buffer.concat([preamble(), frame(Frame.header, encode('BackupHeader', headerOf(source)))]);
  digest.update(begin);
  yield begin;
  const headerDigest = sha256(begin);
  for (const [index, id] of ids.entries()) {
    const record = await source.record(id);
    if (!record) throw new ManagerError('store-corrupt', `vTPM ${id} vanished from the store`);
    const entry = sealEntry(source, headerDigest, index, id, record);
    digest.update(entry);
    yield entry;
    barrier('backup.entry');
  }
  const statement = encode('BackupStatement', {
    count: ids.length,
    digest: digest.digest(),
    finishedAt: BigInt(Date.now()),
  });
  const signature = keys.backupKey.sign(trailerMessage(statement));
  yield frame(Frame.trailer, encode('BackupTrailer', { statement, signature }));
}

function headerOf({
  keys,
  ids,
  recipient,
  anchor,
  enrolment,
  approvals,
  backupId,
}: BackupSource): BackupHeader {
  return {
    backupId,
    storeId: keys.storeId,
    managerId: keys.identity.publicKey,
    createdAt: BigInt(Date.now()),
    recipient,
    signer: keys.backupKey.publicKey,
    count: ids.length,
    anchorRoot: anchor.root,
    anchorCounter: anchor.counter,
    version: VERSION,
    enrolment,
    approvals,
  };
}

const EMPTY = new Uint8Array(0);

function sealEntry(
  { keys, recipient }: BackupSource,
  headerDigest: Uint8Array,
  index: number,
  id: string,
  record: VtpmRecord,
): Buffer {
  const { header } = record;
  const content = contentOf(keys, record);
  try {
    const facts = encode('BackupFacts', {
      index,
      vtpmUuid: uuidToBytes(id),
      vmUuid: header.vmUuid,
      kind: header.kind,
      generation: header.generation,
      epoch: header.epoch,
      marks: header.marks,
      libtpmsVersion: header.libtpmsVersion,
      savedAt: header.savedAt,
      createdAt: header.createdAt,
      size: content?.size ?? 0,
      contentDigest: content ? sha256(content.bytes) : EMPTY,
      ...(header.departure && { departure: header.departure }),
      unsettled: header.unsettled,
      lineage: header.lineage,
    });
    const envelope = content
      ? sealEnvelope(recipient, envelopeNames(headerDigest, facts), content.bytes)
      : EMPTY;
    const signature = keys.backupKey.sign(entryMessage(headerDigest, facts));
    return frame(Frame.entry, encode('BackupEntry', { facts, signature, envelope }));
  } finally {
    wipe(content?.bytes);
  }
}

/**
 * The permanent state alone: a restored vTPM is powered on, and volatile state of another time would bring PCRs and
 * sessions back to a machine that is not in their state.
 */
function contentOf(
  keys: KeyHierarchy,
  record: VtpmRecord,
): { readonly bytes: Buffer; readonly size: number } | undefined {
  const { kind, generation } = record.header;
  if (kind !== 'LIVE' || generation === 0n) return undefined;
  const state = openState(keys, record);
  const { permanent } = state;
  try {
    if (!permanent) {
      throw new ManagerError('store-corrupt', 'a record has a generation but no permanent state');
    }
    const bytes = encode('BackupContent', { salt: randomBytes(32), permanent });
    return { bytes, size: permanent.length };
  } finally {
    wipeState(state);
  }
}
