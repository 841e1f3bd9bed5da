import { bytesEqual, type Peer } from 'vtpm-proto';
import type { ManagerError } from '../error.js';
import { unknownPeer } from '../trust/peers.js';
import type { TrustStore } from '../trust/trust-configuration.js';

export interface WatchedPeer {
  /** As it is enrolled now. @throws ManagerError `unknown-peer` */
  peer(): Peer;
  end(): void;
}

/** @param onRemoved called at once when it is no peer any more */
export function watchPeer(
  { name, hostId, tlsKey }: Peer,
  trust: Pick<TrustStore, 'peerById' | 'onPeersChanged'>,
  onRemoved: (error: ManagerError) => void,
): WatchedPeer {
  const peer = (): Peer => {
    const found = trust.peerById(hostId);
    if (found && bytesEqual(found.tlsKey, tlsKey)) return found;
    throw unknownPeer(name);
  };
  const end = trust.onPeersChanged(() => {
    try {
      peer();
    } catch (error) {
      onRemoved(error as ManagerError);
    }
  });
  return { peer, end };
}
