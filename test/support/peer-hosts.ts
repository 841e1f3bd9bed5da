import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { createLogger } from 'vtpm-common';
import type { AuditEvent } from 'vtpm-manager/audit/index';
import type { KeyHierarchy } from 'vtpm-manager/keys/index';
import type { PeerAddress } from 'vtpm-manager/peer/address';
import type { PeerChannel } from 'vtpm-manager/peer/channel';
import { type DialLimits, dialPeer } from 'vtpm-manager/peer/dial';
import { type HostIdentity, hostIdentity } from 'vtpm-manager/peer/identity';
import type { PeerLimits } from 'vtpm-manager/peer/limits';
import { type PeerListener, servePeers } from 'vtpm-manager/peer/listener';
import { createAnchoredStore } from 'vtpm-manager/store/index';
import { createTrustStore, openTrustStore, type TrustStore } from 'vtpm-manager/trust/trust-configuration';
import type { Peer } from 'vtpm-proto';
import { MemoryStore } from './memory-store.js';
import { anchorOptions, testKeys } from './test-keys.js';
import { testPeer } from './test-peer.js';

const log = createLogger('test', { 'log-level': 'silent', 'log-format': 'json' });

/** A host as another one sees it: its keys, whom it trusts, and its listener over real TLS. */
export class PeerHost {
  readonly audited: AuditEvent[] = [];
  /** Every session that a peer has begun here. */
  readonly sessions: PeerChannel[] = [];
  #onSession: (channel: PeerChannel) => void = () => undefined;
  #listener: PeerListener | undefined;

  private constructor(
    readonly name: string,
    readonly keys: KeyHierarchy,
    readonly identity: HostIdentity,
    readonly trust: TrustStore,
  ) {}

  static async create(name: string): Promise<PeerHost> {
    const keys = testKeys();
    const store = await createAnchoredStore(new MemoryStore(), anchorOptions(keys));
    await createTrustStore(keys, store, randomBytes(32), 1n);
    return new PeerHost(name, keys, hostIdentity(keys), await openTrustStore(keys, store));
  }

  /** @param exchange what it does with a session; keeps it open unless given */
  async listen(
    limits: Partial<PeerLimits> = {},
    exchange: (channel: PeerChannel) => Promise<void> = async (channel) => void (await channel.closed),
    addresses: readonly PeerAddress[] = [{ host: '127.0.0.1', port: 0 }],
  ): Promise<void> {
    this.#listener = await servePeers({
      addresses,
      identity: this.identity,
      trust: this.trust,
      audit: {
        append: async (event) => {
          this.audited.push(event);
          return { length: 0n, digest: Buffer.alloc(32) };
        },
      },
      log,
      limits,
      exchange: (channel) => {
        this.sessions.push(channel);
        this.#onSession(channel);
        return exchange(channel);
      },
    });
  }

  /** The session that a peer begins next. */
  nextSession(): Promise<PeerChannel> {
    return new Promise((resolve) => {
      this.#onSession = resolve;
    });
  }

  get addresses(): string[] {
    return this.#listener?.listening.map(({ address }) => address) ?? [];
  }

  get port(): number {
    return Number(this.addresses[0]?.split(':').at(-1));
  }

  /** How `other` is enrolled here. */
  peerOf(other: PeerHost, changes: Partial<Peer> = {}): Peer {
    return testPeer({
      name: other.name,
      hostId: other.identity.hostKey.publicKey,
      tlsKey: other.identity.tls.publicKey,
      addresses: other.addresses,
      ...changes,
    });
  }

  async add(other: PeerHost, changes: Partial<Peer> = {}): Promise<Peer> {
    const peer = this.peerOf(other, changes);
    await this.trust.addPeer(peer);
    return peer;
  }

  dial(peer: Peer | undefined, limits: Partial<DialLimits> = {}): Promise<PeerChannel> {
    assert.ok(peer);
    const { identity, trust } = this;
    return dialPeer(peer, { identity, trust, log, limits });
  }

  async close(): Promise<void> {
    await this.#listener?.close();
  }
}

export interface PeerPair {
  /** Has dialled. */
  readonly a: PeerHost;
  /** Listens. */
  readonly b: PeerHost;
  /** Of `a`: the source's end. */
  readonly client: PeerChannel;
  /** Of `b`: the destination's end. */
  readonly server: PeerChannel;
  close(): Promise<void>;
}

/** Two hosts that know each other, and one channel between them over a loopback connection with real TLS. */
export async function peerPair(limits: Partial<PeerLimits> = {}): Promise<PeerPair> {
  const [a, b] = [await PeerHost.create('a'), await PeerHost.create('b')];
  await b.listen(limits);
  await b.add(a);
  const peer = await a.add(b);
  const session = b.nextSession();
  const client = await a.dial(peer);
  const server = await session;
  return {
    a,
    b,
    client,
    server,
    close: async () => {
      client.close();
      await b.close();
    },
  };
}
