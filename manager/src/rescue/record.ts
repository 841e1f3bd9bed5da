import { bytesEqual, type Peer, type RecordHeader, type Stay } from 'vtpm-proto';
import { ManagerError } from '../error.js';
import type { KeyHierarchy } from '../keys/index.js';
import {
  isDeparting,
  NO_HEAD,
  NO_MIGRATION,
  restoredRecord,
  type VtpmRecord,
  withStay,
} from '../records/index.js';
import { epochAfter, signNotice, withNotice } from './notice.js';
import type { CheckedRescue } from './request.js';

/**
 * The record of a vTPM that goes on from the backup of a host that is dead: marked, owned by nobody, to be powered on, at a
 * generation and epoch that nobody has had, and with the notice for that host.
 * @param held the tombstone of when it left here
 * @param count what the TPM's counter shows once this is accepted
 */
export function rescuedRecord(
  keys: KeyHierarchy,
  { facts, statement, peer, restore }: CheckedRescue,
  permanent: Uint8Array,
  held: RecordHeader | undefined,
  count: bigint,
): VtpmRecord {
  const epoch = epochAfter(max(facts.epoch, held?.epoch));
  const before = {
    // One more is the first of the rescue.
    epoch: epoch - 1n,
    generation: max(statement.lastGeneration, held?.generation),
    marks: held?.marks ?? [],
    unsettled: held?.unsettled ?? [],
    lineage: [],
    rescues: [],
  };
  const { header, parts } = restoredRecord(keys, facts, permanent, before, count, 'rescued');
  const stay: Stay = {
    host: peer.hostId,
    lastEpoch: facts.epoch,
    lastGeneration: statement.lastGeneration,
    auditHead: NO_HEAD,
    auditLength: 0n,
    migrationId: NO_MIGRATION,
  };
  const rescue = signNotice(keys.hostKey, {
    vtpmUuid: facts.vtpmUuid,
    source: peer.hostId,
    rescuer: keys.hostKey.publicKey,
    epoch: header.epoch,
    generation: header.generation,
    at: BigInt(Date.now()),
    headerDigest: restore.headerDigest,
    facts: restore.facts,
    factsSignature: restore.signature,
  });
  const lineage = withStay(held?.lineage ?? facts.lineage, stay);
  return { header: { ...header, lineage, rescues: withNotice(held?.rescues ?? [], rescue) }, parts };
}

/**
 * Whether a rescue may take the place of what is known here.
 * @throws ManagerError `retired`, `lives-here`, `in-doubt`, `moved`
 */
export function checkPlace(id: string, held: RecordHeader | undefined, peer: Peer): void {
  if (!held) return;
  if (held.kind === 'RETIRED') {
    throw new ManagerError('retired', `vTPM ${id} was retired for good and does not come back`);
  }
  if (isDeparting(held)) {
    throw new ManagerError(
      'in-doubt',
      `vTPM ${id} is here, stopped on its way to another host; settle that first: vtpmctl migrate resolve`,
    );
  }
  if (held.kind === 'LIVE') {
    throw new ManagerError('lives-here', `vTPM ${id} lives on this host; there is nothing to rescue`);
  }
  const destination = held.departure?.destination;
  if (!destination || !bytesEqual(destination, peer.hostId)) {
    throw new ManagerError(
      'moved',
      `vTPM ${id} went from here to host ${destination ? Buffer.from(destination).toString('hex') : 'that is not known'}, not to ${peer.name}: ` +
        'look for it there; a rescue needs a statement about the host that had it last',
    );
  }
}

function max(a: bigint, b = 0n): bigint {
  return a > b ? a : b;
}
