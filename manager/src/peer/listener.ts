import { createServer, type Server } from 'node:net';
import type { Logger } from 'vtpm-common';
import { addressText, type PeerAddress } from './address.js';
import { Entrance, type EntranceOptions } from './entrance.js';

export interface PeerListenerOptions extends EntranceOptions {
  readonly addresses: readonly PeerAddress[];
}

export interface ListeningAddress {
  readonly address: string;
  /** Why nothing listens there; undefined where something does. */
  readonly failure: string | undefined;
}

export interface PeerListener {
  readonly listening: readonly ListeningAddress[];
  /** Takes no more connections, ends those that are open. */
  close(): Promise<void>;
}

/** Milliseconds until an address that could not be had is tried again: a network may come up after the manager. */
const RETRY_MS = 5_000;

/**
 * Listens for other hosts: TLS 1.3, and nothing of a connection is read before the key that it proves is a peer's. Resolves
 * when each address was tried once.
 */
export async function servePeers(options: PeerListenerOptions): Promise<PeerListener> {
  const entrance = new Entrance(options);
  const sockets = options.addresses.map((address) => new ListeningSocket(address, entrance, options.log));
  await Promise.all(sockets.map((socket) => socket.start()));
  return {
    get listening() {
      return sockets.map(({ address, port, failure }) => ({
        address: addressText({ ...address, port }),
        failure,
      }));
    },
    close: async () => {
      await Promise.all(sockets.map((socket) => socket.close()));
      await entrance.close();
    },
  };
}

class ListeningSocket {
  failure: string | undefined;
  #server: Server | undefined;
  #retry: NodeJS.Timeout | undefined;
  #isClosed = false;

  constructor(
    readonly address: PeerAddress,
    private readonly entrance: Entrance,
    private readonly log: Logger,
  ) {}

  get port(): number {
    const bound = this.#server?.address();
    return typeof bound === 'object' && bound ? bound.port : this.address.port;
  }

  /** Never rejects. */
  async start(): Promise<void> {
    const where = addressText(this.address);
    const server = createServer({ noDelay: true, keepAlive: true }, (socket) => this.entrance.come(socket));
    const failure = await new Promise<string | undefined>((resolve) => {
      server.on('error', (error) => resolve(error.message));
      // An IPv6 address stands for itself alone, not for IPv4 too.
      server.listen({ ...this.address, ipv6Only: true }, () => resolve(undefined));
    });
    if (this.#isClosed) return void server.close();
    if (failure === undefined) {
      this.#server = server;
      this.failure = undefined;
      return this.log.info({ address: where }, 'other hosts are listened for');
    }
    if (this.failure !== failure) {
      this.log.error(
        { address: where, reason: failure },
        'no other host is listened for here: the address of the setting peer-listen cannot be had; it is tried again',
      );
    }
    this.failure = failure;
    this.#retry = setTimeout(() => void this.start(), RETRY_MS).unref();
  }

  async close(): Promise<void> {
    this.#isClosed = true;
    clearTimeout(this.#retry);
    this.#server?.close();
  }
}
