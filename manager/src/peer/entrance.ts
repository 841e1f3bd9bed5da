import { isIPv6, type Socket } from 'node:net';
import { createServer, type Server, type TLSSocket } from 'node:tls';
import type { Logger } from 'vtpm-common';
import type { Peer } from 'vtpm-proto';
import { type AuditLog, Refusals } from '../audit/index.js';
import { ManagerError } from '../error.js';
import { Bucket } from '../grpc/limits.js';
import { metrics } from '../metrics.js';
import type { TrustStore } from '../trust/trust-configuration.js';
import type { PeerChannel } from './channel.js';
import { ExchangeServer, type PeerConnection } from './exchange.js';
import type { HostIdentity } from './identity.js';
import { Doorway, PEER_LIMITS, type PeerLimits } from './limits.js';
import { watchPeer } from './still-enrolled.js';
import { bindingOf, provenKey, tlsOptions } from './tls.js';

export interface EntranceOptions {
  readonly identity: HostIdentity;
  readonly trust: Pick<TrustStore, 'peerOf' | 'peerById' | 'onPeersChanged'>;
  readonly audit: Pick<AuditLog, 'append'>;
  readonly log: Logger;
  /** One conversation that a peer began. When it settles the channel is closed, where it was not. */
  exchange(channel: PeerChannel): Promise<void>;
  readonly limits?: Partial<PeerLimits>;
}

/** Who has connected and has not shown yet who it is. */
interface Incoming {
  readonly address: string;
  readonly freePlace: () => void;
  isAdmitted: boolean;
}

interface Admitted {
  readonly peer: Peer;
  readonly connection: PeerConnection;
  readonly socket: TLSSocket;
  /** Bytes that had come, and when that was so. */
  received: number;
  at: number;
}

/** Milliseconds between two looks at what the connections do. */
const WATCH_MS = 250;

/** From the first packet of whoever comes to the session of a peer. */
export class Entrance {
  readonly #limits: PeerLimits;
  readonly #tls: Server;
  readonly #doorway: Doorway;
  readonly #refusals: Refusals;
  readonly #exchange: ExchangeServer;
  readonly #incoming = new Map<string, Incoming>();
  readonly #admitted = new Set<Admitted>();
  readonly #sockets = new Set<Socket>();
  readonly #rates = new Map<string, Bucket>();
  readonly #watch: NodeJS.Timeout;

  constructor(private readonly options: EntranceOptions) {
    this.#limits = { ...PEER_LIMITS, ...options.limits };
    this.#doorway = new Doorway(this.#limits);
    this.#refusals = new Refusals(options.audit);
    this.#exchange = new ExchangeServer(options);
    this.#tls = createServer({
      ...tlsOptions(options.identity.tls),
      requestCert: true,
      // Certificates are self-signed; whose key it is `#arrive` asks, before anything is read.
      rejectUnauthorized: false,
      handshakeTimeout: this.#limits.handshakeMs,
    });
    this.#tls.on('secureConnection', (socket) => this.#arrive(socket));
    this.#tls.on('tlsClientError', (error, socket) => {
      const incoming = this.#incoming.get(nameOf(socket));
      if (incoming)
        this.#refuse(incoming, 'bad-request', `it makes no handshake as peers do: ${error.message}`);
      socket.destroy();
    });
    this.#watch = setInterval(() => this.#look(), WATCH_MS).unref();
  }

  /** Takes over a connection of which nothing was read yet. */
  come(socket: Socket): void {
    socket.on('error', () => undefined);
    const address = socket.remoteAddress;
    const freePlace = address === undefined ? undefined : this.#doorway.enter(networkOf(address));
    if (address === undefined || !freePlace) {
      if (address !== undefined) metrics.peerConnection('rate-limited');
      socket.destroy();
      return;
    }
    const name = nameOf(socket);
    const incoming = { address, freePlace, isAdmitted: false };
    this.#incoming.set(name, incoming);
    this.#sockets.add(socket);
    socket.once('close', () => {
      this.#incoming.delete(name);
      this.#sockets.delete(socket);
      if (!incoming.isAdmitted) setTimeout(freePlace, this.#limits.refusalPauseMs).unref();
    });
    this.#tls.emit('connection', socket);
  }

  async close(): Promise<void> {
    clearInterval(this.#watch);
    this.#exchange.close(new ManagerError('shutting-down', 'the manager stops; try again when it is back'));
    for (const socket of this.#sockets) socket.destroy();
    await this.#refusals.close();
  }

  /** The handshake is done, and nothing that came after it was looked at. */
  #arrive(socket: TLSSocket): void {
    socket.on('error', () => undefined);
    const incoming = this.#incoming.get(nameOf(socket));
    if (!incoming) return void socket.destroy();
    const key = provenKey(socket);
    const peer = key && this.options.trust.peerOf(key);
    if (!peer) {
      const who = key ? 'no peer has the TLS key that it proves' : 'it proves no key as peers do';
      this.#refuse(incoming, 'unknown-peer', who, key);
      socket.destroy();
      return;
    }
    if (!this.#hasRoom(peer)) {
      this.#refuse(incoming, 'rate-limited', `too many connections of ${peer.name} at once`, key);
      socket.destroy();
      return;
    }
    incoming.isAdmitted = true;
    incoming.freePlace();
    metrics.peerConnection('admitted');
    this.#admit(peer, socket);
  }

  #admit(peer: Peer, socket: TLSSocket): void {
    const { trust, identity } = this.options;
    const watched = watchPeer(peer, trust, (error) => {
      connection.end(error);
      socket.destroy();
    });
    const binding = bindingOf(peer.tlsKey, identity.tls.publicKey);
    const connection = this.#exchange.inject(socket, { peer: watched.peer, binding });
    const admitted = { peer, connection, socket, received: socket.bytesRead, at: performance.now() };
    this.#admitted.add(admitted);
    socket.once('close', () => {
      this.#admitted.delete(admitted);
      watched.end();
    });
  }

  #hasRoom({ name }: Peer): boolean {
    const { connections, connectionsPerPeer, rate } = this.#limits;
    const own = [...this.#admitted].filter(({ peer }) => peer.name === name).length;
    if (this.#admitted.size >= connections || own >= connectionsPerPeer) return false;
    const bucket = this.#rates.get(name) ?? new Bucket(rate);
    this.#rates.set(name, bucket);
    return bucket.take();
  }

  #refuse(
    incoming: Incoming,
    code: 'unknown-peer' | 'bad-request' | 'rate-limited',
    why: string,
    key?: Buffer,
  ): void {
    metrics.peerConnection(code);
    const facts = { from: incoming.address, ...(key && { key: key.toString('hex') }) };
    this.options.log.debug({ ...facts, reason: code }, `a connection of another host is closed: ${why}`);
    const reason = { code, message: why };
    void this.#refusals.note({ actor: 'manager', action: 'peer-connect', verdict: 'refused', reason, facts });
  }

  #look(): void {
    const now = performance.now();
    const { bytes, silenceMs, idleMs } = this.#limits;
    for (const admitted of this.#admitted) {
      const { peer, connection, socket } = admitted;
      if (socket.bytesRead !== admitted.received) {
        admitted.received = socket.bytesRead;
        admitted.at = now;
      }
      const why =
        admitted.received > bytes
          ? `it has sent more than ${bytes} bytes`
          : now - admitted.at > silenceMs
            ? `nothing has come from it for ${silenceMs} ms`
            : now - connection.idleSince > idleMs
              ? `it has had no session for ${idleMs} ms`
              : undefined;
      if (why === undefined) continue;
      this.options.log.warn({ peer: peer.name }, `a connection of a peer is closed: ${why}`);
      connection.end(new ManagerError('rate-limited', `the connection is closed: ${why}`));
      socket.destroy();
    }
  }
}

/** Of a connection, while it is one. */
function nameOf({ remoteAddress, remotePort, localAddress, localPort }: Socket): string {
  return `${remoteAddress} ${remotePort} ${localAddress} ${localPort}`;
}

/** Who has one IPv6 address has 2^64 of them (RFC 4291 section 2.5.1). */
function networkOf(address: string): string {
  if (!isIPv6(address)) return address;
  const [head = '', tail] = address.replace(/%.*$/, '').split('::');
  const groups = head === '' ? [] : head.split(':');
  if (tail !== undefined) {
    const end = tail === '' ? [] : tail.split(':');
    while (groups.length + end.length < 8) groups.push('0');
    groups.push(...end);
  }
  return groups.slice(0, 4).join(':');
}
