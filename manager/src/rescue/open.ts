import type { Logger } from 'vtpm-common';
import type { AuditLog } from '../audit/index.js';
import type { KeyHierarchy } from '../keys/index.js';
import type { VtpmRegistry } from '../ownership/registry.js';
import { dialPeer } from '../peer/dial.js';
import { hostIdentity } from '../peer/identity.js';
import type { TrustStore } from '../trust/trust-configuration.js';
import { RescueControl } from './control.js';
import { RescueMessenger } from './messenger.js';

/** The rescues of an unlocked manager, and who tells other hosts of them. */
export function openRescues(parts: {
  readonly keys: KeyHierarchy;
  readonly trust: TrustStore;
  readonly registry: VtpmRegistry;
  readonly audit: AuditLog;
  readonly log: Logger;
}): { readonly rescues: RescueControl; readonly messenger: RescueMessenger } {
  const { keys, trust, log } = parts;
  const identity = hostIdentity(keys);
  const rescues = new RescueControl({ ...parts, onHeld: () => void messenger.tellAll() });
  const messenger = new RescueMessenger({
    book: rescues,
    log,
    peers: () => trust.peers(),
    dial: (peer) => dialPeer(peer, { identity, trust, log }),
  });
  return { rescues, messenger };
}
