import {
  type BackupFacts,
  bytesEqual,
  type FencingStatement,
  type Peer,
  type RestoreRequest,
  uuidToText,
} from 'vtpm-proto';
import { parse, verifiedFacts } from '../backup/format.js';
import { ManagerError } from '../error.js';
import type { KeyHierarchy } from '../keys/index.js';
import type { TrustStore } from '../trust/trust-configuration.js';
import { checkFencing, checkStatementFits } from './fencing.js';

/** A rescue that is in order; what lives here has not been looked at. */
export interface CheckedRescue {
  readonly statement: FencingStatement;
  /** The host that is dead. */
  readonly peer: Peer;
  /** What it said of the vTPM in the backup. */
  readonly facts: BackupFacts;
  readonly restore: RestoreRequest;
}

/**
 * @param bytes of a RescueRequest; bytes of the result are views into them
 * @throws ManagerError `not-fenced`, `unknown-peer`, `wrong-manager`, `retired`, `moved`, `in-doubt`, `bad-request`
 */
export function checkRescue(
  bytes: Uint8Array,
  {
    keys,
    trust,
  }: { readonly keys: KeyHierarchy; readonly trust: Pick<TrustStore, 'isToolstackKeyTrusted' | 'peerById'> },
): CheckedRescue {
  const { fencing, restore } = parse('RescueRequest', bytes, 'the request');
  const statement = checkFencing(fencing, trust, Date.now());
  const peer = deadPeer(statement, keys, trust);
  if (!restore) throw new ManagerError('bad-request', 'the request has no backup');
  const facts = factsOf(peer, restore);
  checkStatementFits(statement, facts);
  if (facts.kind !== 'LIVE' || facts.generation === 0n) throw nothingThere(facts, peer);
  checkStayed(facts, peer, keys);
  return { statement, peer, facts, restore };
}

function deadPeer({ host }: FencingStatement, keys: KeyHierarchy, trust: Pick<TrustStore, 'peerById'>): Peer {
  if (bytesEqual(host, keys.hostKey.publicKey)) {
    throw new ManagerError('bad-request', 'the statement is about this host itself; use vtpmctl restore');
  }
  const peer = trust.peerById(host);
  if (peer) return peer;
  throw new ManagerError(
    'unknown-peer',
    `host ${Buffer.from(host).toString('hex')} is no peer of this one, and nothing shows that the backup is its; ` +
      'add it with the identity that it once gave: vtpmctl peer add',
  );
}

function factsOf(peer: Peer, restore: RestoreRequest): BackupFacts {
  try {
    return verifiedFacts(peer.backupKey, restore.headerDigest, restore);
  } catch (cause) {
    throw new ManagerError(
      'wrong-manager',
      `this backup was not made by ${peer.name}, which the statement is about, or was changed`,
      { cause },
    );
  }
}

/** One that was on its way to this host would live here: what came of that is known. */
function checkStayed({ departure, vtpmUuid }: BackupFacts, { name }: Peer, keys: KeyHierarchy): void {
  if (!departure || bytesEqual(departure.destination, keys.hostKey.publicKey)) return;
  throw new ManagerError(
    'in-doubt',
    `vTPM ${uuidToText(vtpmUuid)} was on its way from ${name} to host ${Buffer.from(departure.destination).toString('hex')} ` +
      'when the backup was made, and may live there: look there; where it does not, take an earlier backup',
  );
}

function nothingThere({ kind, vtpmUuid }: BackupFacts, { name }: Peer): ManagerError {
  const head = `vTPM ${uuidToText(vtpmUuid)} had no state on ${name} when the backup was made`;
  if (kind === 'RETIRED') return new ManagerError('retired', `${head}: it was retired for good`);
  if (kind === 'MOVED') return new ManagerError('moved', `${head}: it lived on another host`);
  return new ManagerError('bad-request', `${head}: it was never started`);
}
