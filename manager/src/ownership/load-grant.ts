import { bytesEqual, type LoadResponse, type RecordHeader, type Session } from 'vtpm-proto';
import { ManagerError } from '../error.js';
import { type KeyHierarchy, wipe } from '../keys/index.js';
import { openState, type VtpmRecord, wipeState } from '../records/index.js';
import type { CheckedLoad } from './ticket-check.js';

/**
 * The answer to a Load, boxed to the worker on the ticket: state and session key of the record that it will own.
 * @throws ManagerError `store-corrupt`
 */
export function sealGrant(
  keys: KeyHierarchy,
  { claim, box }: CheckedLoad,
  record: VtpmRecord,
  manufacture: boolean,
): LoadResponse {
  const { header } = record;
  const session = sessionOf(header);
  const sessionKey = keys.sessionKey({ ...session, vtpmUuid: header.vtpmUuid, epoch: header.epoch });
  const state = openState(keys, record);
  const { permanent, volatile, checkpointKey, referenceKey } = state;
  const { suspension } = header;
  try {
    if (header.generation > 0n && !permanent) {
      throw new ManagerError('store-corrupt', 'the record has a generation but no permanent state');
    }
    return box.seal('LoadGrant', {
      loadId: claim.loadId,
      sessionId: session.sessionId,
      sessionKey,
      epoch: header.epoch,
      generation: header.generation,
      permanent: permanent ?? new Uint8Array(0),
      manufacture,
      checkpointKey: checkpointKey ?? new Uint8Array(0),
      ...(suspension && volatile && { suspended: { ...suspension, volatile } }),
      referenceKey,
      arrived: suspension !== undefined && bytesEqual(suspension.vmRunId, header.vmRunId),
    });
  } finally {
    wipe(sessionKey);
    wipeState(state);
  }
}

function sessionOf(header: RecordHeader): Session {
  if (!header.session) throw new ManagerError('internal', 'a loaded record has no session');
  return header.session;
}
