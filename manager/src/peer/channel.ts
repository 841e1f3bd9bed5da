import { setTimeout as delay } from 'node:timers/promises';
import { decode, encode, MAX_MESSAGE_BYTES, type Peer, type PeerMessage, ProtoError } from 'vtpm-proto';
import { ManagerError } from '../error.js';

/**
 * One conversation with another host over mutual TLS 1.3: both TLS keys are proven, nothing more. The two ends of a
 * migration run on it, and it is the same at both.
 */
export interface PeerChannel {
  /** Whose TLS key it is, as it is enrolled now. @throws ManagerError `unknown-peer` where it was removed */
  readonly peer: Peer;
  /** SHA-256 over both TLS keys, in the order client, server; 32 bytes. */
  readonly binding: Buffer;
  /** Bytes of messages so far. */
  readonly sentBytes: number;
  readonly receivedBytes: number;
  /**
   * Resolves when the message is on its way and there is room for the next.
   * @throws ManagerError `too-large`; `peer-late` where the other end reads nothing for long, which ends it; what it was
   * closed with
   */
  send(message: PeerMessage): Promise<void>;
  /**
   * The next message, in their order; one caller at a time. What came before the channel was closed is still given out.
   * @throws ManagerError `peer-late` where none came: the channel is of use still. What it was closed with, `peer-closed`
   * where the other end did it
   */
  receive(deadlineMs: number): Promise<PeerMessage>;
  /** Ends it at both ends; again it does nothing. Who dialled hears code and sentence of `error`. */
  close(error?: ManagerError): void;
  /** Resolves when it is closed, from whichever end, with the reason. Never rejects. */
  readonly closed: Promise<ManagerError>;
}

/** What a channel runs on: a gRPC stream, at the one end or at the other. */
export interface Carrier {
  /** @param done called when there is room for the next */
  write(message: Buffer, done: (error?: Error | null) => void): void;
  /** Reads no more, or goes on. */
  hold(isHeld: boolean): void;
  /** After what was written. */
  end(error: ManagerError | undefined): void;
}

/** Messages that are read before anybody asks for them. */
const MESSAGES_AHEAD = 2;
/** Milliseconds that the other end may leave a message unread. */
const SEND_TIMEOUT_MS = 30_000;

export interface ChannelOptions {
  /** @throws ManagerError `unknown-peer` */
  readonly peer: () => Peer;
  readonly binding: Buffer;
  readonly sendTimeoutMs?: number;
}

export class StreamChannel implements PeerChannel {
  readonly closed: Promise<ManagerError>;
  sentBytes = 0;
  receivedBytes = 0;
  readonly #settleClosed: (reason: ManagerError) => void;
  readonly #messages: PeerMessage[] = [];
  #reason: ManagerError | undefined;
  /** Called when there is a message, or there comes none any more. */
  #wake: () => void = () => undefined;
  #isHeld = false;

  constructor(
    private readonly options: ChannelOptions,
    private readonly carrier: Carrier,
  ) {
    let settle: (reason: ManagerError) => void = () => undefined;
    this.closed = new Promise((resolve) => {
      settle = resolve;
    });
    this.#settleClosed = settle;
  }

  get peer(): Peer {
    return this.options.peer();
  }

  get binding(): Buffer {
    return this.options.binding;
  }

  async send(message: PeerMessage): Promise<void> {
    if (this.#reason) throw this.#reason;
    const bytes = encode('PeerMessage', message);
    if (bytes.length > MAX_MESSAGE_BYTES) {
      throw new ManagerError(
        'too-large',
        `a message for ${this.peer.name} has ${bytes.length} bytes, the limit is ${MAX_MESSAGE_BYTES}`,
      );
    }
    this.sentBytes += bytes.length;
    const written = new Promise<void>((resolve) => {
      this.carrier.write(bytes, (error) => {
        if (error) this.over(closedBy(`the connection broke: ${error.message}`), true);
        resolve();
      });
    });
    const isDone = await this.#within(this.options.sendTimeoutMs ?? SEND_TIMEOUT_MS, written);
    if (!isDone) this.over(late('does not read what it is sent'), true);
    if (this.#reason) throw this.#reason;
  }

  async receive(deadlineMs: number): Promise<PeerMessage> {
    if (this.#messages.length === 0 && !this.#reason) {
      const woken = new Promise<void>((resolve) => {
        this.#wake = resolve;
      });
      await this.#within(deadlineMs, woken);
    }
    const message = this.#messages.shift();
    this.#hold();
    if (message) return message;
    throw this.#reason ?? late(`has sent nothing for ${deadlineMs} ms`);
  }

  close(error?: ManagerError): void {
    this.over(error ?? closedBy('the connection is closed'), true, error);
  }

  /** A message came. @param bytes of a PeerMessage */
  take(bytes: Uint8Array): void {
    if (this.#reason) return;
    this.receivedBytes += bytes.length;
    try {
      if (bytes.length > MAX_MESSAGE_BYTES) throw new ProtoError('malformed', 'it is too large');
      this.#messages.push(decode('PeerMessage', bytes));
    } catch (cause) {
      const error = new ManagerError('bad-request', `not a PeerMessage: ${(cause as Error).message}`, {
        cause,
      });
      this.over(error, true, error);
      return;
    }
    this.#hold();
    this.#wake();
  }

  /**
   * Nothing is sent any more, and nothing comes. Again it does nothing.
   * @param isHere ended at this end @param told to the other end
   */
  over(reason: ManagerError, isHere = false, told?: ManagerError): void {
    if (this.#reason) return;
    this.#reason = reason;
    this.#wake();
    this.#settleClosed(reason);
    if (isHere) this.carrier.end(told);
  }

  #hold(): void {
    const isHeld = this.#messages.length >= MESSAGES_AHEAD;
    if (isHeld === this.#isHeld || this.#reason) return;
    this.#isHeld = isHeld;
    this.carrier.hold(isHeld);
  }

  /** @returns whether it came before the time was up; also where the channel is closed */
  async #within(milliseconds: number, body: Promise<void>): Promise<boolean> {
    const stop = new AbortController();
    try {
      const timeout = delay(milliseconds, false, { signal: stop.signal }).catch(() => false);
      return await Promise.race([Promise.race([body, this.closed]).then(() => true), timeout]);
    } finally {
      stop.abort();
    }
  }
}

/** The other end, or the network, ended it. */
export function closedBy(what: string): ManagerError {
  return new ManagerError('peer-closed', what);
}

function late(what: string): ManagerError {
  return new ManagerError('peer-late', `the other host ${what}`);
}
