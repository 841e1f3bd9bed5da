import type { SigningKey } from 'vtpm-proto';
import type { KeyHierarchy } from '../keys/index.js';
import { type TlsIdentity, tlsIdentity } from './certificate.js';

/** This host, as it shows itself to others. */
export interface HostIdentity {
  /** Its public half is the host id. */
  readonly hostKey: SigningKey;
  readonly tls: TlsIdentity;
}

export function hostIdentity(keys: KeyHierarchy): HostIdentity {
  return { hostKey: keys.hostKey, tls: tlsIdentity(keys.peerTlsSeed) };
}
