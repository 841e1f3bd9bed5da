import { randomBytes } from 'node:crypto';
import { Alg, pcrDigest } from 'tpm2-ts-bindings';
import { createLogger } from 'vtpm-common';
import { ManagerError } from 'vtpm-manager/error';
import { type AttestorParts, TpmAttestor } from 'vtpm-manager/migration/attestor';
import { type DestinationEnd, DestinationMigration } from 'vtpm-manager/migration/destination';
import type { Arrivals, Attestor, Departures, Host } from 'vtpm-manager/migration/ports';
import { type SourceEnd, SourceMigration } from 'vtpm-manager/migration/source';
import { Talk } from 'vtpm-manager/migration/talk';
import { tlsIdentity } from 'vtpm-manager/peer/certificate';
import type { PeerChannel } from 'vtpm-manager/peer/channel';
import { dialPeer } from 'vtpm-manager/peer/dial';
import type { HostIdentity } from 'vtpm-manager/peer/identity';
import { type PeerListener, servePeers } from 'vtpm-manager/peer/listener';
import {
  attestationPublic,
  openRootTpm,
  type RootTpm,
  type RootTpmEnrolment,
} from 'vtpm-manager/root-tpm/index';
import { type MigrateOrder, type Peer, signingKeyFromSeed } from 'vtpm-proto';
import { type RecordingProxy, startRecordingProxy } from './recording-proxy.js';
import { type Swtpm, startSwtpm } from './swtpm.js';
import { testPeer } from './test-peer.js';
import { pcrExtend } from './tpm-commands.js';

const SRK = 0x81000001;
export const PCRS = 'sha256:0,7';
const LIBTPMS = '0.9.2';
const log = createLogger('test', { 'log-level': 'silent', 'log-format': 'json' });

/** The peers of a host, and its attestation key, in memory. */
class Peers {
  list: Peer[] = [];
  #attestationKey: Promise<Uint8Array> | undefined;

  peerOf = (tlsKey: Uint8Array): Peer | undefined => this.#find((peer) => peer.tlsKey, tlsKey);
  peerById = (hostId: Uint8Array): Peer | undefined => this.#find((peer) => peer.hostId, hostId);
  onPeersChanged = (): (() => void) => () => undefined;

  async changePeer(name: string, edit: (peer: Peer) => Peer): Promise<Peer> {
    this.list = this.list.map((peer) => (peer.name === name ? edit(peer) : peer));
    return this.named(name);
  }

  named(name: string): Peer {
    const found = this.list.find((peer) => peer.name === name);
    if (!found) throw new Error(`no peer ${name}`);
    return found;
  }

  ensureAttestationKey(make: () => Promise<Uint8Array>): Promise<Uint8Array> {
    this.#attestationKey ??= make();
    return this.#attestationKey;
  }

  #find(of: (peer: Peer) => Uint8Array, bytes: Uint8Array): Peer | undefined {
    return this.list.find((peer) => Buffer.compare(of(peer), bytes) === 0);
  }
}

/**
 * One end of a migration as far as both ends attest: chip, TLS and protocol are the manager's own. Behind them is no vTPM:
 * what would be done to one is noted, and where the worker would be stopped it ends.
 */
export class AttestingHost {
  readonly identity: HostIdentity = {
    hostKey: signingKeyFromSeed(randomBytes(32)),
    tls: tlsIdentity(randomBytes(32)),
  };
  readonly peers = new Peers();
  /** What was done to vTPMs. */
  readonly done: string[] = [];
  approvals: AttestorParts['approvals'] = () => [];
  attestor: Attestor;
  /** Of what comes in; an attacker takes another one. */
  exchange = (channel: PeerChannel): Promise<unknown> => this.#arrive(channel);
  /** How each migration to here ended. */
  readonly ends: DestinationEnd[] = [];
  #listener: PeerListener | undefined;
  readonly #sessions: Promise<unknown>[] = [];

  private constructor(
    readonly name: string,
    private readonly chip: { readonly swtpm: Swtpm; readonly bus: RecordingProxy },
    readonly root: RootTpm,
    public enrolment: RootTpmEnrolment,
  ) {
    this.attestor = new TpmAttestor({
      tpm: () => this.root,
      enrolment: () => this.enrolment,
      trust: this.peers,
      approvals: () => this.approvals(),
    });
  }

  static async start(name: string): Promise<AttestingHost> {
    const swtpm = await startSwtpm();
    const bus = await startRecordingProxy(swtpm.socket);
    const root = await openRootTpm({ kind: 'unix', path: bus.path });
    const installation = randomBytes(16);
    const anchorAuth = randomBytes(32);
    const { enrolment } = await root.enrol({ installation, anchorAuth, pcrSelection: PCRS, srkHandle: SRK });
    return new AttestingHost(name, { swtpm, bus }, root, enrolment);
  }

  /** Takes what comes, on IPv4 and IPv6. */
  async listen(identity: HostIdentity = this.identity): Promise<void> {
    this.#listener = await servePeers({
      addresses: [
        { host: '127.0.0.1', port: 0 },
        { host: '::1', port: 0 },
      ],
      identity,
      trust: this.peers,
      audit: { append: () => Promise.resolve({ length: 0n, digest: Buffer.alloc(32) }) },
      log,
      exchange: async (channel) => {
        const session = this.exchange(channel);
        this.#sessions.push(session);
        await session;
      },
    });
  }

  /** All that came has ended. */
  async settled(): Promise<void> {
    await Promise.allSettled(this.#sessions);
  }

  /** Something that no boot before measured. */
  async extend(pcr: number): Promise<void> {
    await this.chip.bus.inject(pcrExtend(pcr, randomBytes(32)));
  }

  /** What a restart of the host is to its chip. */
  async resetChip(): Promise<void> {
    await this.chip.swtpm.restart();
    // The connection is gone with it; the next call makes another one.
    await this.root.readRevocationCounter(this.enrolment).catch(() => undefined);
  }

  /** As another host enrols it: where it listens, its keys, the platform that it has now. */
  async asPeer(): Promise<Peer> {
    const { publicArea } = await this.root.endorsement();
    const key = await this.peers.ensureAttestationKey(() => this.root.makeAttestationKey(this.enrolment));
    const { pcrs } = await this.root.readPlatformState(this.enrolment);
    const values = Object.values(pcrs).map((value) => Buffer.from(value, 'hex'));
    return testPeer({
      name: this.name,
      hostId: this.identity.hostKey.publicKey,
      tlsKey: this.identity.tls.publicKey,
      addresses: this.#listener?.listening.map(({ address }) => address) ?? [],
      endorsementKey: publicArea,
      attestationKey: attestationPublic(key),
      platforms: [{ pcrSelection: PCRS, pcrDigest: pcrDigest(Alg.SHA256, values), approvedAt: 1n }],
      installation: Buffer.from(this.enrolment.installation, 'hex'),
      revocationHandle: this.enrolment.revocation.handle,
    });
  }

  /** Sends a running vTPM, as far as it is let. */
  async migrateTo(hostId: Uint8Array, dryRun = false): Promise<SourceEnd> {
    const order: MigrateOrder = {
      format: 1,
      managerId: randomBytes(32),
      toolstackKey: randomBytes(32),
      vtpmUuid: randomBytes(16),
      vmUuid: randomBytes(16),
      destination: hostId,
      expectedEpoch: 1n,
      leastGeneration: 1n,
      migrationId: randomBytes(16),
      bootId: randomBytes(16),
      expiresAtMonotonicMs: 1n << 60n,
      mode: 'LIVE',
      dryRun,
      description: Buffer.from('{}'),
    };
    const migration = new SourceMigration(
      {
        order,
        orderer: {
          progress: () => undefined,
          reaped: new Promise(() => undefined),
          cancelled: new AbortController().signal,
        },
        host: this.#host(),
        departures: this.#noting<Departures>('departures', {
          announce: async () => undefined,
          renounce: () => undefined,
        }),
        attestor: this.attestor,
        resolver: undefined as never,
        log,
      },
      {
        vtpmUuid: 'v',
        vmUuid: order.vmUuid,
        vmRunId: randomBytes(16),
        epoch: 1n,
        generation: 1n,
        libtpmsVersion: LIBTPMS,
        stateBytes: 5000,
        isConnected: true,
        isSuspended: false,
      },
    );
    return await migration.run();
  }

  dial(peer: Peer, identity: HostIdentity = this.identity): Promise<PeerChannel> {
    return dialPeer(peer, { identity, trust: this.peers, log });
  }

  async close(): Promise<void> {
    await this.#listener?.close();
    await this.root.close();
    await this.chip.bus.close();
    await this.chip.swtpm.stop();
  }

  async #arrive(channel: PeerChannel): Promise<void> {
    const migration = new DestinationMigration({
      talk: new Talk(channel, 'destination'),
      host: this.#host(),
      attestor: this.attestor,
      arrivals: this.#noting<Arrivals>('arrivals', {
        check: async () => undefined,
        announce: async () => undefined,
        expect: async () => {
          this.done.push('arrivals.expect');
          const loadWaiting = Promise.resolve({ libtpmsVersion: LIBTPMS });
          return { migrationId: randomBytes(16), vtpmUuid: 'v', loadWaiting, release: () => undefined };
        },
      }),
      doorkeeper: { check: async () => undefined, ask: async () => undefined },
      admit: () => undefined,
      onCommitted: () => undefined,
      log,
    });
    this.ends.push(await migration.run());
  }

  #host(): Host {
    return {
      hostId: this.identity.hostKey.publicKey,
      libtpmsVersion: () => LIBTPMS,
      peer: (hostId) => {
        const peer = this.peers.peerById(hostId);
        if (peer) return peer;
        throw new ManagerError('unknown-peer', 'it is no peer');
      },
      dial: (peer) => this.dial(peer),
      checkRoom: () => undefined,
      auditTail: async () => [],
    };
  }

  /** Each call is noted and fails, but for `known` ones. */
  #noting<T extends object>(what: string, known: Partial<T> = {}): T {
    return new Proxy(known, {
      get: (target, name) =>
        Reflect.get(target, name) ??
        (async () => {
          this.done.push(`${what}.${String(name)}`);
          throw new ManagerError('shutting-down', 'as far as the test goes');
        }),
    }) as T;
  }
}
