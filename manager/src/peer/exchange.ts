import type { Socket } from 'node:net';
import {
  type handleBidiStreamingCall,
  type Server,
  ServerCredentials,
  type ServiceDefinition,
} from '@grpc/grpc-js';
import type { Logger } from 'vtpm-common';
import { EXCHANGE_PATH, type Peer } from 'vtpm-proto';
import { ManagerError } from '../error.js';
import { nameConnection, newServer, raw } from '../grpc/server.js';
import { refusal, statusOf } from '../grpc/status.js';
import { closedBy, type PeerChannel, StreamChannel } from './channel.js';

/** The whole gRPC surface for other hosts. */
export const peerServiceDefinition = {
  Exchange: { path: EXCHANGE_PATH, requestStream: true, responseStream: true, ...raw },
} as const satisfies ServiceDefinition;

/** Whose connection it is, proven. */
export interface ConnectionFacts {
  /** As it is enrolled now. @throws ManagerError `unknown-peer` */
  readonly peer: () => Peer;
  readonly binding: Buffer;
}

export interface PeerConnection {
  /** By `performance.now()`, since when it has no session; infinite while it has one. */
  readonly idleSince: number;
  /** Ends its session here; the caller closes the socket. */
  end(error: ManagerError): void;
}

interface Connection extends ConnectionFacts {
  idleSince: number;
  session: StreamChannel | undefined;
}

/** grpc-js over connections whose other end is known. */
export class ExchangeServer {
  readonly #server: Server = newServer();
  readonly #injector = this.#server.createConnectionInjector(ServerCredentials.createInsecure());
  readonly #connections = new Map<string, Connection>();
  #count = 0;

  constructor(
    private readonly options: {
      readonly log: Logger;
      exchange(channel: PeerChannel): Promise<void>;
    },
  ) {
    this.#server.addService(peerServiceDefinition, { Exchange: this.#exchange });
  }

  inject(socket: Socket, facts: ConnectionFacts): PeerConnection {
    this.#count += 1;
    const name = `peer-connection-${this.#count}`;
    const connection: Connection = { ...facts, idleSince: performance.now(), session: undefined };
    nameConnection(socket, name);
    this.#connections.set(name, connection);
    socket.once('close', () => {
      this.#connections.delete(name);
      connection.session?.over(closedBy('the connection broke'));
    });
    this.#injector.injectConnection(socket);
    return {
      get idleSince() {
        return connection.idleSince;
      },
      end: (error) => connection.session?.over(error),
    };
  }

  close(error: ManagerError): void {
    for (const { session } of this.#connections.values()) session?.over(error);
    this.#server.forceShutdown();
  }

  readonly #exchange: handleBidiStreamingCall<Buffer, Buffer> = (call) => {
    const connection = this.#connections.get(call.getPeer());
    if (!connection || connection.session) {
      const error = new ManagerError('busy', 'this connection has a session; make another one');
      call.emit('error', statusOf(error));
      return;
    }
    const channel = new StreamChannel(connection, {
      write: (message, done) => call.write(message, done),
      hold: (isHeld) => (isHeld ? call.pause() : call.resume()),
      end: (error) => (error ? call.emit('error', statusOf(error)) : call.end()),
    });
    connection.session = channel;
    connection.idleSince = Number.POSITIVE_INFINITY;
    call.on('data', (message: Buffer) => channel.take(message));
    call.on('end', () => channel.over(closedBy('the other host has ended it'), true));
    call.on('cancelled', () => channel.over(closedBy('the other host has gone')));
    call.on('error', () => undefined);
    void channel.closed.then(() => {
      connection.session = undefined;
      connection.idleSince = performance.now();
    });
    void this.#run(channel);
  };

  /** Never rejects. */
  async #run(channel: StreamChannel): Promise<void> {
    try {
      await this.options.exchange(channel);
      channel.close();
    } catch (error) {
      const reason = refusal(error);
      this.options.log.warn({ reason: reason.code }, `a session of a peer ended: ${reason.message}`);
      channel.close(reason);
    }
  }
}
