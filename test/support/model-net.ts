import { randomBytes } from 'node:crypto';
import { createLogger } from 'vtpm-common';
import { ManagerError } from 'vtpm-manager';
import { EMPTY_HEAD } from 'vtpm-manager/audit/index';
import { MigrationControl } from 'vtpm-manager/migration/control';
import type { Attestor } from 'vtpm-manager/migration/ports';
import { type Carrier, closedBy, type PeerChannel, StreamChannel } from 'vtpm-manager/peer/channel';
import type { PlatformFacts } from 'vtpm-manager/peer/evidence';
import { RescueControl } from 'vtpm-manager/rescue/control';
import { boxKeyPair, bytesEqual, type Peer, x25519 } from 'vtpm-proto';
import type { World } from '../manager/ownership-fixture.js';
import { testPeer } from './test-peer.js';

/**
 * What becomes of one message on its way. After `lose` the line is cut, as a time limit would; what is on `hold` goes when it
 * is let go, where its sender has not closed the line.
 */
export type Fate = 'deliver' | 'hold' | 'lose' | 'double' | 'swap' | 'cut-before' | 'cut-after';

const log = createLogger('test', { 'log-level': 'silent', 'log-format': 'json' });

/**
 * Lines between hosts that treat messages as they are told, in the order in which they are sent. The channels are the
 * manager's own; what is left out is TLS.
 */
export class ModelNet {
  readonly #hosts = new Map<string, ModelHost>();
  /** Of the messages to come, the next one first. */
  fates: Fate[] = [];
  /** Of those that come after these. */
  further: Fate = 'deliver';
  /** No line comes about. */
  isDown = false;
  /** Hosts that have dialled, and no line came about. */
  readonly inVain = new Set<string>();
  sent = 0;
  /** Lets go of the message that is on hold, where there is one. */
  letGo: (() => void) | undefined;
  /** Called before a line comes about or does not, with who dials. */
  onDial: (from: string) => void = () => undefined;
  /** Called when a message is on its way, with who sends it. */
  onMessage: (from: string) => void = () => undefined;

  join(host: ModelHost): void {
    this.#hosts.set(host.name, host);
  }

  dial(from: ModelHost, to: string): PeerChannel {
    const other = this.#hosts.get(to);
    this.onDial(from.name);
    if (this.isDown || !other?.isUp) {
      this.inVain.add(from.name);
      throw new ManagerError('peer-unreachable', `${to} does not answer`);
    }
    const binding = randomBytes(32);
    const ends: [StreamChannel | undefined, StreamChannel | undefined] = [undefined, undefined];
    const cut = (): void => {
      for (const end of ends) end?.over(closedBy('the line was cut'));
    };
    const carrier = (toEnd: 0 | 1): Carrier => {
      let kept: Buffer | undefined;
      let isEnded = false;
      const deliver = (bytes: Buffer): void => {
        setImmediate(() => ends[toEnd]?.take(bytes));
      };
      return {
        write: (bytes, done) => {
          this.sent += 1;
          const fate = this.fates.shift() ?? this.further;
          if (fate === 'hold') {
            this.letGo = () => {
              if (!isEnded) deliver(bytes);
              done();
            };
            return;
          }
          done();
          this.onMessage(toEnd === 1 ? from.name : other.name);
          if (fate === 'cut-before' || fate === 'lose') return void setImmediate(cut);
          if (fate === 'swap' && !kept) {
            // The next one overtakes it; where there is none it is late.
            kept = bytes;
            setTimeout(() => {
              if (kept) deliver(kept);
              kept = undefined;
            }, 5);
            return;
          }
          deliver(bytes);
          if (fate === 'double') deliver(bytes);
          if (kept) deliver(kept);
          kept = undefined;
          if (fate === 'cut-after') setImmediate(() => setImmediate(cut));
        },
        hold: () => undefined,
        end: () => {
          isEnded = true;
          setImmediate(() => ends[toEnd]?.over(closedBy('the other host has ended it')));
        },
      };
    };
    ends[0] = new StreamChannel({ peer: () => from.peer(to), binding }, carrier(1));
    ends[1] = new StreamChannel({ peer: () => other.peer(from.name), binding }, carrier(0));
    const server = ends[1];
    void other.control.exchange(server);
    return ends[0];
  }
}

/** A host of the model: its records are the registry's own, its chip is software. */
export class ModelHost {
  control!: MigrationControl;
  rescues!: RescueControl;
  isUp = true;
  readonly #peers = new Map<string, Peer>();

  constructor(
    readonly name: string,
    readonly world: World,
    private readonly net: ModelNet,
  ) {
    net.join(this);
  }

  knows(other: ModelHost): void {
    const { publicKey } = other.world.keys.hostKey;
    this.#peers.set(other.name, testPeer({ name: other.name, hostId: publicKey, provenAt: 1n }));
  }

  peer(name: string): Peer {
    const peer = this.#peers.get(name);
    if (!peer) throw new ManagerError('unknown-peer', `${name} is no peer`);
    return peer;
  }

  /** The protocol anew, as after a start of the manager. */
  async begin(): Promise<void> {
    const { keys, registry, trust } = this.world;
    this.rescues = new RescueControl({
      keys,
      registry,
      trust: {
        isToolstackKeyTrusted: (key, vtpm) => trust.isToolstackKeyTrusted(key, vtpm),
        peerById: (id) => [...this.#peers.values()].find(({ hostId }) => bytesEqual(hostId, id)),
      },
      audit: { append: async () => EMPTY_HEAD },
      log,
      onHeld: () => undefined,
    });
    this.control = new MigrationControl({
      host: {
        hostId: keys.hostKey.publicKey,
        libtpmsVersion: () => '0.9.2',
        peer: (hostId) => {
          for (const peer of this.#peers.values()) if (bytesEqual(peer.hostId, hostId)) return peer;
          throw new ManagerError('unknown-peer', 'it is no peer');
        },
        dial: async (peer) => this.net.dial(this, peer.name),
        checkRoom: () => undefined,
        auditTail: async () => [],
      },
      departures: registry.departures,
      arrivals: registry.arrivals,
      rescues: this.rescues,
      attestor: new ModelChip(),
      orders: {
        identity: keys.identity,
        trust,
        bootId: () => this.world.boot,
        monotonicMs: () => this.world.now,
      },
      events: registry.events,
      audit: async () => undefined,
      log,
      pausesMs: [0, 5, 20],
    });
    registry.events.follow((event) => {
      if (event.type === 'incoming') setImmediate(() => this.#accept(event.migration));
    });
    await this.control.start();
  }

  #accept(migration: string): void {
    try {
      this.control.accept(migration);
    } catch {
      // It has ended meanwhile.
    }
  }
}

/** Says of a transcript that it is this one, and shares a secret once: what the protocol has of a chip. */
class ModelChip implements Attestor {
  async makeImportKey() {
    let pair: ReturnType<typeof boxKeyPair> | undefined = boxKeyPair();
    const empty = Buffer.alloc(0);
    return {
      publicArea: Buffer.from(pair.publicKey),
      pcrSelection: 'sha256:7',
      certifyInfo: empty,
      certifySignature: empty,
      unwrap: async (point: Uint8Array) => {
        const own = pair;
        pair = undefined;
        if (!own) throw new ManagerError('import-key-lost', 'it was used');
        return x25519(own.secretKey, point);
      },
      drop: async () => {
        pair = undefined;
      },
    };
  }

  async evidence(qualifying: Uint8Array) {
    const empty = new Uint8Array(0);
    return {
      attest: qualifying,
      signature: empty,
      pcrSelection: 'sha256:7',
      pcrValues: [],
      approvals: [],
      revocationAttest: empty,
      revocationSignature: empty,
    };
  }

  answer = async () => new Uint8Array(0);
  challenge = () => undefined;
  prove = async () => undefined;

  verify(_: Peer, { attest }: { attest: Uint8Array }, qualifying: Uint8Array): PlatformFacts {
    if (!bytesEqual(attest, qualifying)) throw new ManagerError('peer-unattested', 'of another transcript');
    const boot = { resetCount: 0, restartCount: 0 };
    return { pcrSelection: '', pcrs: {}, pcrDigest: Buffer.alloc(32), boot, approvedBy: 'the model' };
  }

  wrap(_: Peer, { publicArea }: { publicArea: Uint8Array }) {
    const own = boxKeyPair();
    return { point: own.publicKey, secret: x25519(own.secretKey, publicArea) };
  }
}
