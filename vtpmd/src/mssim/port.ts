import { type ConnectOpts, Socket, type SocketConstructorOpts } from 'node:net';
import { MAX_FRAMED_BYTES } from '../channels/framing.js';
import type { Read } from './protocol.js';

export interface Answer {
  readonly bytes: Buffer;
  /** Nothing follows. */
  readonly ends?: boolean;
}

export interface PortParts<R> {
  read(bytes: Buffer): Read<R> | undefined;
  /** Views in the request are valid until the answer is there. */
  answer(request: R): Promise<Answer>;
  /** Called once: the connection is closed and none of its requests is being answered. */
  onClosed(): void;
}

const EMPTY = Buffer.alloc(0);
/** How long a client may take to close its end of a connection that is over. */
const LINGER_MS = 1000;

/**
 * A connection to one of the simulator's ports: requests are read, done and answered one after another. What a client sends
 * ahead, or does not take, is kept for it up to a bound.
 */
export class PortConnection<R> {
  readonly #parts: PortParts<R>;
  readonly #socket: Socket;
  #pending: Buffer = EMPTY;
  #isBusy = false;
  #isClosed = false;
  #isEnded = false;
  #isOver = false;
  #timer: NodeJS.Timeout | undefined;

  /** @param fd owned by the connection from now on */
  constructor(fd: number, parts: PortParts<R>) {
    this.#parts = parts;
    const options: SocketConstructorOpts & ConnectOpts = { fd, allowHalfOpen: true };
    this.#socket = new Socket(options);
    this.#socket.on('data', (chunk: Buffer) => {
      if (this.#isOver) return;
      this.#pending = Buffer.concat([this.#pending, chunk]);
      if (this.#pending.length >= MAX_FRAMED_BYTES) this.#socket.pause();
      this.#next();
    });
    this.#socket.on('drain', () => this.#next());
    this.#socket.on('end', () => {
      this.#isEnded = true;
      if (this.#isOver) this.#socket.destroySoon();
      else this.#next();
    });
    this.#socket.on('error', () => {});
    this.#socket.on('close', () => {
      this.#isClosed = true;
      clearTimeout(this.#timer);
      if (!this.#isBusy) parts.onClosed();
    });
  }

  get isGone(): boolean {
    return this.#socket.destroyed;
  }

  #next(): void {
    if (this.#isBusy || this.#isClosed || this.#isOver || this.#socket.writableNeedDrain) return;
    const read = this.#parts.read(this.#pending);
    if (!read) {
      if (this.#isEnded) this.#end();
      else this.#socket.resume();
      return;
    }
    this.#isBusy = true;
    const { request, length } = read;
    // A request that cannot be answered ends its connection, and nobody else's.
    this.#parts.answer(request).then(
      (answer) => this.#answered(answer, length),
      () => this.#answered({ bytes: Buffer.alloc(0), ends: true }, length),
    );
  }

  #answered({ bytes, ends = false }: Answer, length: number): void {
    this.#isBusy = false;
    if (this.#isClosed) {
      this.#parts.onClosed();
      return;
    }
    this.#pending = Buffer.from(this.#pending.subarray(length));
    if (bytes.length > 0) this.#socket.write(bytes);
    if (ends) this.#end();
    else this.#next();
  }

  /** Its client is to get the last answer and not ECONNRESET: what it sent behind the last request is thrown away. */
  #end(): void {
    this.#isOver = true;
    this.#pending = EMPTY;
    this.#socket.end();
    if (this.#isEnded) {
      this.#socket.destroySoon();
      return;
    }
    this.#socket.resume();
    this.#timer = setTimeout(() => this.#socket.destroy(), LINGER_MS);
  }
}
