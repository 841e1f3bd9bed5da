import { once } from 'node:events';
import { connect, type Socket } from 'node:net';
import { setTimeout as sleep } from 'node:timers/promises';
import { concat, wipe } from '../bytes.js';
import type { TpmError } from '../error.js';
import { announcedSize, MAX_MESSAGE, type Transport, transportError } from './transport.js';

export interface SocketOptions {
  /** Milliseconds that connecting may take. */
  readonly connectTimeout?: number;
  /** Milliseconds that one command may take. RSA key generation in software can take tens of seconds. */
  readonly deadline?: number;
}

/** Where a stream socket listens: a unix socket, or a TCP port at an IPv4 or IPv6 address or a host name. */
export type Endpoint = { readonly path: string } | { readonly host: string; readonly port: number };

/** Milliseconds for one command, unless the caller says another deadline. */
export const DEADLINE_MS = 120_000;

function nameOf(endpoint: Endpoint): string {
  if ('path' in endpoint) return endpoint.path;
  const { host, port } = endpoint;
  return host.includes(':') ? `[${host}]:${port}` : `${host}:${port}`;
}

/** @throws TpmError `transport` where nobody accepts the connection */
export async function connectStream(endpoint: Endpoint, options: SocketOptions): Promise<Stream> {
  const { connectTimeout = 10_000, deadline = DEADLINE_MS } = options;
  const name = nameOf(endpoint);
  const over = AbortSignal.timeout(connectTimeout);
  for (;;) {
    try {
      return new Stream(name, await connectOnce(endpoint, over), deadline);
    } catch (cause) {
      if (over.aborted) throw transportError(`${name}: no connection within ${connectTimeout} ms`, cause);
      // unix(7): the queue of the listener is full. swtpm's has room for few, and serves one client at a time.
      if ((cause as NodeJS.ErrnoException).code !== 'EAGAIN') {
        throw transportError(`${name}: ${explain(cause as NodeJS.ErrnoException)}`, cause);
      }
      await sleep(20);
    }
  }
}

async function connectOnce(endpoint: Endpoint, signal: AbortSignal): Promise<Socket> {
  // An answer is waited for after each command: without noDelay one written in two pieces costs a delayed acknowledgement.
  const socket = connect({ ...endpoint, noDelay: true });
  try {
    await once(socket, 'connect', { signal });
    return socket;
  } catch (error) {
    // Of several addresses of a name, a later one may still fail.
    socket.on('error', () => undefined).destroy();
    throw error;
  }
}

function explain(error: NodeJS.ErrnoException): string {
  if (error.code === 'ENOENT') return 'there is no such socket';
  if (error.code === 'ECONNREFUSED') return 'nobody listens there';
  // One error per address tried has an empty message of its own.
  return error.message || error.code || 'no address of it could be reached';
}

/**
 * How long the answer is of which these are the first bytes, or undefined where they do not say it yet.
 * @throws Error with what is wrong with the bytes
 */
export type Framing = (received: Buffer) => number | undefined;

interface Waiter {
  readonly framing: Framing;
  resolve(response: Buffer): void;
  reject(error: TpmError): void;
  readonly timer: NodeJS.Timeout;
}

/** A connection on which each request has one answer, and nothing comes that was not asked for. */
export class Stream {
  #waiter: Waiter | undefined;
  #received: Buffer = Buffer.alloc(0);
  #failure: TpmError | undefined;
  readonly #onFailure: (() => void)[] = [];

  constructor(
    private readonly name: string,
    private readonly socket: Socket,
    private readonly deadline: number,
  ) {
    socket.on('data', (chunk: Buffer) => this.#take(chunk));
    socket.on('error', (error) => this.fail(error.message, error));
    socket.on('close', () => this.fail('the connection was closed'));
  }

  /** Calls `listener` once, when the stream can no more be used; at once where that is so already. */
  onFailure(listener: () => void): void {
    if (this.#failure === undefined) this.#onFailure.push(listener);
    else listener();
  }

  /** @throws TpmError `transport`; the stream is of no use then, unless another request was under way */
  exchange(request: Uint8Array, framing: Framing): Promise<Buffer> {
    if (this.#failure !== undefined) return Promise.reject(this.#failure);
    if (this.#waiter !== undefined)
      return Promise.reject(transportError(`${this.name}: a command is already under way`));
    return new Promise((resolve, reject) => {
      // A late answer would be read as that of the next command: after the deadline the connection is of no use.
      const timer = setTimeout(() => this.fail(`no answer within ${this.deadline} ms`), this.deadline);
      this.#waiter = { framing, resolve, reject, timer };
      // A copy, because the caller wipes the command after the answer; the kernel may take it later than that.
      const copy = concat(request);
      this.socket.write(copy, () => wipe(copy));
    });
  }

  /** Ends the connection: the request under way and all later ones are rejected with this message. */
  fail(message: string, cause?: unknown): void {
    if (this.#failure !== undefined) return;
    this.#failure = transportError(`${this.name}: ${message}`, cause);
    this.socket.destroy();
    wipe(this.#received);
    const waiter = this.#waiter;
    this.#waiter = undefined;
    if (waiter !== undefined) {
      clearTimeout(waiter.timer);
      waiter.reject(this.#failure);
    }
    for (const listener of this.#onFailure) listener();
  }

  #take(chunk: Buffer): void {
    const received = concat(this.#received, chunk);
    wipe(this.#received, chunk);
    this.#received = received;
    try {
      if (this.#isWhole(received)) this.#answer(received);
    } catch (problem) {
      this.fail((problem as Error).message);
    }
  }

  /** @throws Error with what is wrong with the bytes so far */
  #isWhole(received: Buffer): boolean {
    if (this.#waiter === undefined) throw new Error('bytes came that nobody asked for');
    const size = this.#waiter.framing(received);
    if (size === undefined || received.length < size) return false;
    if (received.length > size) throw new Error('more bytes came than were announced');
    return true;
  }

  #answer(received: Buffer): void {
    const waiter = this.#waiter;
    this.#waiter = undefined;
    this.#received = Buffer.alloc(0);
    clearTimeout(waiter?.timer);
    waiter?.resolve(received);
  }
}

const tpmFraming: Framing = (received) => announcedSize(received, MAX_MESSAGE);

/** Bare commands and answers on a stream socket. */
export class StreamTransport implements Transport {
  constructor(private readonly stream: Stream) {}

  transmit(command: Uint8Array): Promise<Buffer> {
    return this.stream.exchange(command, tpmFraming);
  }

  async close(): Promise<void> {
    this.stream.fail('closed');
  }
}
