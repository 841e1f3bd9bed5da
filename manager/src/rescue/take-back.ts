import type { Logger } from 'vtpm-common';
import {
  bytesEqual,
  type FencingStatement,
  type Peer,
  type SignedFencing,
  type SignedRescue,
  uuidToBytes,
} from 'vtpm-proto';
import type { AuditActor } from '../audit/index.js';
import { ManagerError } from '../error.js';
import type { KeyHierarchy } from '../keys/index.js';
import type { PendingDeparture } from '../ownership/departure.js';
import type { VtpmRegistry } from '../ownership/registry.js';
import { takenBack, type VtpmRecord } from '../records/index.js';
import type { TrustStore } from '../trust/trust-configuration.js';
import { checkFencing, checkStatementFits, notFenced } from './fencing.js';
import { epochAfter, signNotice, withNotice } from './notice.js';

export interface TakeBackParts {
  readonly keys: KeyHierarchy;
  readonly trust: Pick<TrustStore, 'isToolstackKeyTrusted' | 'peerById'>;
  readonly registry: Pick<VtpmRegistry, 'rescues'>;
  readonly log: Logger;
  /** Something is to be told to a host that was dead. */
  onHeld(): void;
}

/** The operator's word about the destination of a departure. */
export interface FencedDestination {
  readonly statement: FencingStatement;
  readonly peer: Peer;
}

/**
 * Whether the statement is about the destination of this very departure: what was said before it left is about another time.
 * @throws ManagerError `not-fenced`; `unknown-peer` where that host could not be told when it is back
 */
export function checkDestinationFenced(
  signed: SignedFencing | undefined,
  { vtpmUuid, generation, departure }: PendingDeparture,
  trust: TakeBackParts['trust'],
): FencedDestination {
  const statement = checkFencing(signed, trust, Date.now());
  checkStatementFits(statement, { vtpmUuid: uuidToBytes(vtpmUuid), generation }, 'the departure');
  const host = hex(departure.destination);
  if (!bytesEqual(statement.host, departure.destination)) {
    throw notFenced(
      `the statement is about host ${hex(statement.host)}, vTPM ${vtpmUuid} went to host ${host}`,
    );
  }
  if (statement.at < departure.at) {
    throw notFenced(`the statement was made before vTPM ${vtpmUuid} left; look again, and make a new one`);
  }
  const peer = trust.peerById(departure.destination);
  if (peer) return { statement, peer };
  throw new ManagerError(
    'unknown-peer',
    `host ${host} is no peer of this one, and could not be told when it is back; ` +
      'add it with the identity that it once gave: vtpmctl peer add',
  );
}

/**
 * Has a vTPM go on here whose destination is gone for good, from where it was frozen, with a notice for that host. The TPM has
 * counted it when it resolves.
 * @throws ManagerError `unknown-migration` where it is not on its way any more; `busy`
 */
export async function takeBack(
  { keys, registry, log, onHeld }: TakeBackParts,
  actor: AuditActor,
  { vtpmUuid: id, departure }: PendingDeparture,
  { statement, peer }: FencedDestination,
): Promise<void> {
  const { migrationId, destination: host, epoch, generation } = departure;
  const vtpmUuid = uuidToBytes(id);
  const facts = {
    migration: hex(migrationId),
    to: peer.name,
    host: hex(host),
    lastGeneration: String(statement.lastGeneration),
    method: statement.method,
    fenced: new Date(Number(statement.at)).toISOString(),
  };
  await registry.rescues.takeBack(id, actor, facts, (held, count): VtpmRecord | undefined => {
    const left = held.header.departure;
    if (!left || !bytesEqual(left.migrationId, migrationId)) return undefined;
    const gone = { host, lastGeneration: statement.lastGeneration, epoch: epochAfter(held.header.epoch) };
    const { header, parts } = takenBack(keys, held, gone, count);
    const rescue: SignedRescue = signNotice(keys.hostKey, {
      vtpmUuid,
      source: host,
      rescuer: keys.hostKey.publicKey,
      epoch: header.epoch,
      generation: header.generation,
      at: BigInt(Date.now()),
      headerDigest: NOTHING,
      facts: NOTHING,
      factsSignature: NOTHING,
      departure: { migrationId, vtpmUuid, epoch, generation },
    });
    return { header: { ...header, rescues: withNotice(header.rescues, rescue) }, parts };
  });
  log.warn(
    { vtpm: id, to: peer.name, method: statement.method },
    'a vTPM was taken back from a destination that is gone for good; should that host run it, there are two of it',
  );
  onHeld();
}

const NOTHING = new Uint8Array(0);

function hex(bytes: Uint8Array): string {
  return Buffer.from(bytes).toString('hex');
}
