import { connect, type Socket } from 'node:net';
import { concat, wipe } from '../bytes.js';
import type { TpmError } from '../error.js';
import { HEADER, MAX_MESSAGE, type Transport, transportError } from './transport.js';

export interface SocketOptions {
  /** Milliseconds that connecting may take. */
  readonly connectTimeout?: number;
  /** Milliseconds that one command may take. RSA key generation in software can take tens of seconds. */
  readonly deadline?: number;
}

/**
 * A TPM behind a unix stream socket that carries bare commands and answers, as swtpm's data channel does.
 * @throws TpmError `transport` where nobody accepts the connection
 */
export function openSocket(path: string, options: SocketOptions = {}): Promise<Transport> {
  const { connectTimeout = 10_000, deadline = 120_000 } = options;
  return new Promise((resolve, reject) => {
    const socket = connect({ path });
    const fail = (message: string, cause?: unknown): void => {
      socket.destroy();
      reject(transportError(`${path}: ${message}`, cause));
    };
    const timer = setTimeout(() => fail(`no connection within ${connectTimeout} ms`), connectTimeout);
    socket.once('error', (error: NodeJS.ErrnoException) => {
      clearTimeout(timer);
      fail(error.code === 'ENOENT' ? 'there is no such socket' : error.message, error);
    });
    socket.once('connect', () => {
      clearTimeout(timer);
      socket.removeAllListeners('error');
      resolve(new SocketTransport(path, socket, deadline));
    });
  });
}

interface Waiter {
  resolve(response: Buffer): void;
  reject(error: TpmError): void;
  readonly timer: NodeJS.Timeout;
}

class SocketTransport implements Transport {
  #waiter: Waiter | undefined;
  #received: Buffer = Buffer.alloc(0);
  #failure: TpmError | undefined;

  constructor(
    private readonly path: string,
    private readonly socket: Socket,
    private readonly deadline: number,
  ) {
    socket.on('data', (chunk: Buffer) => this.#take(chunk));
    socket.on('error', (error) => this.#fail(error.message, error));
    socket.on('close', () => this.#fail('the connection was closed'));
  }

  transmit(command: Uint8Array): Promise<Buffer> {
    if (this.#failure !== undefined) return Promise.reject(this.#failure);
    if (this.#waiter !== undefined)
      return Promise.reject(transportError(`${this.path}: a command is already under way`));
    return new Promise((resolve, reject) => {
      // A late answer would be read as that of the next command: after the deadline the connection is of no use.
      const timer = setTimeout(() => this.#fail(`no answer within ${this.deadline} ms`), this.deadline);
      this.#waiter = { resolve, reject, timer };
      // A copy, because the caller wipes the command after the answer; the kernel may take it later than that.
      this.socket.write(concat(command));
    });
  }

  async close(): Promise<void> {
    this.#fail('closed');
  }

  #take(chunk: Buffer): void {
    const received = concat(this.#received, chunk);
    wipe(this.#received, chunk);
    this.#received = received;
    const problem = this.#judge(received);
    if (problem !== undefined) this.#fail(problem);
    if (this.#waiter === undefined || received.length < HEADER) return;
    if (received.length < received.readUInt32BE(2)) return;
    const { resolve, timer } = this.#waiter;
    clearTimeout(timer);
    this.#waiter = undefined;
    this.#received = Buffer.alloc(0);
    resolve(received);
  }

  /** What is wrong with the bytes so far, if anything. */
  #judge(received: Buffer): string | undefined {
    if (this.#waiter === undefined) return 'bytes came that nobody asked for';
    if (received.length < HEADER) return undefined;
    const size = received.readUInt32BE(2);
    if (size < HEADER || size > MAX_MESSAGE) return `an answer of ${size} bytes was announced`;
    return received.length > size ? 'more bytes came than were announced' : undefined;
  }

  #fail(message: string, cause?: unknown): void {
    if (this.#failure !== undefined) return;
    this.#failure = transportError(`${this.path}: ${message}`, cause);
    this.socket.destroy();
    const waiter = this.#waiter;
    this.#waiter = undefined;
    if (waiter === undefined) return;
    clearTimeout(waiter.timer);
    waiter.reject(this.#failure);
  }
}
