import { randomBytes } from 'node:crypto';
import type { Peer } from 'vtpm-proto';

/** A peer as the trust configuration keeps it, of keys that nobody has. */
export function testPeer(changes: Partial<Peer> = {}): Peer {
  return {
    name: 'b',
    hostId: randomBytes(32),
    tlsKey: randomBytes(32),
    addresses: ['192.0.2.7:7799', '[2001:db8::7]:7799'],
    endorsementKey: randomBytes(90),
    attestationKey: randomBytes(90),
    endorsedBy: 'pinned',
    provenAt: 0n,
    platforms: [{ pcrSelection: 'sha256:7', pcrDigest: randomBytes(32), approvedAt: 1n }],
    policyAuthority: '',
    maySend: true,
    mayReceive: true,
    addedAt: 1n,
    installation: randomBytes(16),
    revocationHandle: 0x01800001,
    backupKey: randomBytes(32),
    ...changes,
  };
}
