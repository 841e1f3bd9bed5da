import { bootId, monotonicMs } from 'vtpm-common';
import type { AuditLog } from '../audit/index.js';
import { ManagerError } from '../error.js';
import type { KeyHierarchy } from '../keys/index.js';
import type { VtpmRegistry } from '../ownership/registry.js';
import { dialPeer } from '../peer/dial.js';
import { hostIdentity } from '../peer/identity.js';
import type { RescueBook, TakesBack } from '../rescue/exchange.js';
import type { ServiceOptions } from '../service.js';
import type { TrustStore } from '../trust/trust-configuration.js';
import { TpmAttestor } from './attestor.js';
import { HEADER_LIMITS } from './bundle.js';
import { installedLibtpms } from './compatibility.js';
import { MigrationControl } from './control.js';
import type { Host } from './ports.js';

/** Of the newest entries of the log, so many are looked through for those of one vTPM. */
const LOOKED_THROUGH = 512;

/** The migrations of an unlocked manager. */
export function openMigrations({
  keys,
  trust,
  registry,
  rescues,
  audit,
  checkRoom,
  options: { chip, log },
}: {
  readonly keys: KeyHierarchy;
  readonly trust: TrustStore;
  readonly registry: VtpmRegistry;
  readonly rescues: RescueBook & TakesBack;
  readonly audit: AuditLog;
  checkRoom(): void;
  readonly options: Pick<ServiceOptions, 'chip' | 'log'>;
}): MigrationControl {
  const identity = hostIdentity(keys);
  const host: Host = {
    hostId: keys.hostKey.publicKey,
    libtpmsVersion: installedLibtpms,
    peer: (hostId) => {
      const peer = trust.peerById(hostId);
      if (peer) return peer;
      const id = Buffer.from(hostId).toString('hex');
      throw new ManagerError('unknown-peer', `host ${id} is no peer; see them: vtpmctl peer list`);
    },
    dial: (peer) => dialPeer(peer, { identity, trust, log }),
    checkRoom,
    auditTail: (vtpm) => auditTail(audit, vtpm),
  };
  return new MigrationControl({
    host,
    departures: registry.departures,
    arrivals: registry.arrivals,
    rescues,
    attestor: new TpmAttestor({ ...chip, trust }),
    orders: { identity: keys.identity, trust, bootId, monotonicMs },
    events: registry.events,
    audit: (event) => audit.append(event),
    log,
  });
}

async function auditTail(audit: AuditLog, vtpm: string): Promise<string[]> {
  const entries = await audit.tail(LOOKED_THROUGH);
  return entries
    .filter((entry) => entry.vtpm === vtpm)
    .slice(-HEADER_LIMITS.auditLines)
    .map((entry) => JSON.stringify(entry, (_, value) => (typeof value === 'bigint' ? String(value) : value)))
    .filter((line) => line.length <= HEADER_LIMITS.auditLineLength);
}
