import { chmodSync, rmSync } from 'node:fs';
import { createServer as createHttpServer, type RequestListener, type ServerResponse } from 'node:http';
import { createServer, Socket } from 'node:net';
import { setTimeout as delay } from 'node:timers/promises';
import { checkSocketPath, type Logger, peerCredentials, socketFd } from 'vtpm-common';
import { ToolstackError } from '../error.js';
import type { InheritedDescriptors, KeptDescriptors } from './handover/descriptors.js';
import type { ApiHandOver } from './handover/state.js';
import { isWithin } from './is-within.js';

export interface ApiServerOptions {
  readonly path: string;
  readonly log: Logger;
  readonly handle: RequestListener;
}

/** What the program before this one hands over. */
export interface ApiInheritance {
  readonly state: ApiHandOver;
  readonly descriptors: InheritedDescriptors;
}

const MAX_CONNECTIONS = 256;
/** Calls that take longer to arrive, and answers that take longer to be read, are cut off by a hand-over and at the end. */
const CALL_LIMIT_MS = 5_000;
const POLL_MS = 5;

/**
 * The socket of the supervisor's API, and HTTP behind it. It can be handed over without a call being lost: calls under way
 * are answered first, and of connections that come meanwhile nothing is read, so that the next program can.
 */
export class ApiServer {
  readonly #options: ApiServerOptions;
  readonly #http;
  readonly #entrance;
  readonly #unanswered = new Set<ServerResponse>();
  /** Every connection that is read, with what had been read of it when it was last at rest. */
  readonly #read = new Map<Socket, number>();
  /** Connections of which nothing was read. */
  readonly #waiting = new Set<Socket>();
  #isHeld = false;

  private constructor(options: ApiServerOptions) {
    this.#options = options;
    this.#http = createHttpServer((request, response) => {
      const { socket } = request;
      this.#unanswered.add(response);
      response.once('close', () => {
        this.#unanswered.delete(response);
        if (this.#read.has(socket)) this.#read.set(socket, socket.bytesRead);
      });
      options.handle(request, response);
    });
    this.#http.requestTimeout = 10_000;
    this.#http.headersTimeout = 5_000;
    // It does not listen itself, and without this it would watch over neither.
    this.#http.emit('listening');
    this.#entrance = createServer({ pauseOnConnect: true, allowHalfOpen: true }, (socket) =>
      this.#accept(socket),
    );
    this.#entrance.maxConnections = MAX_CONNECTIONS;
  }

  /** @throws Error where the socket cannot be made, ToolstackError `corrupt` where what is handed over does not listen */
  static async open(options: ApiServerOptions, before?: ApiInheritance): Promise<ApiServer> {
    const server = new ApiServer(options);
    if (before) server.#adopt(before);
    else await server.#listen();
    // The next connection may be accepted again; without a handler this one would end the process.
    server.#entrance.on('error', (error) =>
      options.log.warn({ socket: options.path, reason: error.message }, 'a connection was lost'),
    );
    return server;
  }

  /**
   * No new connections. Resolves when those that are there have ended, or are cut off. @param done when what calls wait for
   * has been done
   */
  async close(done: Promise<void>): Promise<void> {
    const closed = new Promise<void>((resolve) => this.#entrance.close(() => resolve()));
    rmSync(this.#options.path, { force: true });
    this.#http.closeIdleConnections();
    for (const socket of this.#waiting) socket.destroy();
    await done;
    await isWithin(closed, CALL_LIMIT_MS);
    for (const socket of this.#read.keys()) socket.destroy();
    await closed;
  }

  /**
   * From now on new connections wait. Resolves when all calls but `caller`'s are answered, or cut off because nobody reads
   * the answer. The operations that they asked for have settled.
   */
  async hold(caller: Socket): Promise<void> {
    this.#isHeld = true;
    const until = performance.now() + CALL_LIMIT_MS;
    while ((this.#isAnswering(caller) || this.#isArriving(caller)) && performance.now() < until) {
      await delay(POLL_MS);
    }
    for (const { req } of this.#unanswered) if (req.socket !== caller) req.socket.destroy();
  }

  release(): void {
    this.#isHeld = false;
    for (const socket of this.#waiting) this.#serve(socket);
    this.#waiting.clear();
  }

  /** What the next program needs to know. Only while held. */
  handOver(kept: KeptDescriptors, caller: Socket): ApiHandOver {
    return {
      listener: kept.keep(socketFd(this.#entrance)),
      waiting: [...this.#waiting]
        .filter(({ destroyed }) => !destroyed)
        .map((socket) => kept.keep(socketFd(socket))),
      caller: caller.destroyed ? null : kept.keep(socketFd(caller)),
    };
  }

  #isAnswering(caller: Socket): boolean {
    return [...this.#unanswered].some(({ req }) => req.socket !== caller);
  }

  #isArriving(caller: Socket): boolean {
    return [...this.#read].some(([socket, atRest]) => socket !== caller && socket.bytesRead > atRest);
  }

  #listen(): Promise<void> {
    const path = checkSocketPath(this.#options.path);
    // This supervisor holds the lock of the path, so what is there was left by one that is gone.
    rmSync(path, { force: true });
    return new Promise((resolve, reject) => {
      this.#entrance.once('error', reject);
      this.#entrance.listen(path, () => {
        this.#entrance.removeListener('error', reject);
        chmodSync(path, 0o600);
        resolve();
      });
    });
  }

  #adopt({ state, descriptors }: ApiInheritance): void {
    this.#entrance.listen({ fd: descriptors.takeSocket(state.listener) });
    if (!this.#entrance.listening) {
      throw new ToolstackError('corrupt', `descriptor ${state.listener} of the hand-over does not listen`);
    }
    for (const fd of state.waiting) {
      this.#accept(
        new Socket({ fd: descriptors.takeSocket(fd), readable: true, writable: true, allowHalfOpen: true }),
      );
    }
  }

  #accept(socket: Socket): void {
    if (isStranger(socket)) {
      socket.destroy();
    } else if (this.#isHeld) {
      this.#waiting.add(socket);
      socket.on('error', () => undefined);
      socket.once('close', () => this.#waiting.delete(socket));
    } else {
      this.#serve(socket);
    }
  }

  #serve(socket: Socket): void {
    this.#read.set(socket, 0);
    socket.once('close', () => {
      this.#read.delete(socket);
      // Those behind one that was not read to its end are never closed themselves.
      for (const response of this.#unanswered) {
        if (response.req.socket === socket) this.#unanswered.delete(response);
      }
    });
    this.#http.emit('connection', socket);
    socket.resume();
  }
}

/** The socket's mode keeps others out already; root may have passed a connection on. */
function isStranger(socket: Socket): boolean {
  try {
    const { uid } = peerCredentials(socketFd(socket));
    return uid !== 0 && uid !== process.getuid?.();
  } catch {
    // Gone before it was looked at.
    return true;
  }
}
