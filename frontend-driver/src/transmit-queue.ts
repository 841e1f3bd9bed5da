import type { TransmitOptions } from './channel.js';
import { FrontendError } from './error.js';
import { asBuffer, HEADER_BYTES, MAX_MESSAGE_BYTES } from './framing.js';

/** What carries one command at a time. */
export interface Carrier {
  /** The longest command, in bytes. */
  readonly room: number;
  /** `answered`, `notRun` or `end` of the queue follows. */
  send(command: Buffer, locality: number): void;
  /**
   * Nobody waits for the command that was sent any more, or only for what becomes of it.
   * @returns whether something still becomes of it; otherwise the carrier has ended the queue
   */
  giveUp(error: FrontendError): boolean;
}

interface Waiting {
  readonly command: Buffer;
  readonly locality: number;
  /** Why it was given up, where that was after it was sent. */
  givenUp: FrontendError | undefined;
  resolve(answer: Buffer): void;
  reject(error: FrontendError): void;
}

/**
 * A TPM answers one command at a time and its answers carry no number, so commands wait here and only the first is on its
 * way. Commands that still wait can be given up without harm.
 */
export class TransmitQueue {
  readonly ended: Promise<FrontendError>;
  readonly #carrier: Carrier;
  readonly #queue: Waiting[] = [];
  #inFlight: Waiting | undefined;
  #isSending = false;
  #end: FrontendError | undefined;
  #resolveEnded: (reason: FrontendError) => void = () => {};

  constructor(carrier: Carrier) {
    this.#carrier = carrier;
    this.ended = new Promise((resolve) => {
      this.#resolveEnded = resolve;
    });
  }

  get isOver(): boolean {
    return this.#end !== undefined;
  }

  get isWaiting(): boolean {
    return this.#inFlight !== undefined;
  }

  /** As TpmChannel; whether the locality can be carried is known to the caller. */
  async transmit(command: Uint8Array, options: TransmitOptions): Promise<Buffer> {
    const { locality = 0, signal, deadline } = options;
    checkCommand(command, this.#carrier.room);
    if (signal?.aborted) throw new FrontendError('aborted', 'given up before it was sent', signal.reason);
    if (this.#end) throw this.#end;
    return await new Promise<Buffer>((resolve, reject) => {
      const onAbort = () =>
        this.#giveUp(waiting, new FrontendError('aborted', 'given up', signal?.reason), false);
      const timer =
        deadline === undefined
          ? undefined
          : setTimeout(() => {
              const message = `no answer within ${deadline} ms`;
              this.#giveUp(waiting, new FrontendError('deadline', message), true);
            }, deadline);
      const release = () => {
        clearTimeout(timer);
        signal?.removeEventListener('abort', onAbort);
      };
      const waiting: Waiting = {
        // A copy: the caller may reuse its buffer while the command waits.
        command: Buffer.from(command),
        locality,
        givenUp: undefined,
        resolve: (answer) => {
          release();
          resolve(answer);
        },
        reject: (error) => {
          release();
          reject(error);
        },
      };
      signal?.addEventListener('abort', onAbort, { once: true });
      this.#queue.push(waiting);
      this.#sendNext();
    });
  }

  /** The answer to the command on its way. @returns false where there is none */
  answered(answer: Buffer): boolean {
    const waiting = this.#inFlight;
    if (!waiting) return false;
    this.#inFlight = undefined;
    waiting.resolve(answer);
    this.#sendNext();
    return true;
  }

  /** The command on its way was given up and did not run. */
  notRun(): void {
    const waiting = this.#inFlight;
    this.#inFlight = undefined;
    waiting?.reject(
      waiting.givenUp ?? new FrontendError('aborted', 'the vTPM gave the command up; it did not run'),
    );
    this.#sendNext();
  }

  /**
   * Rejects everything with `reason`.
   * @param ofInFlight for the command on its way, where that is told something else
   */
  end(reason: FrontendError, ofInFlight = reason): void {
    if (this.#end) return;
    this.#end = reason;
    this.#inFlight?.reject(ofInFlight);
    this.#inFlight = undefined;
    for (const waiting of this.#queue.splice(0)) waiting.reject(reason);
    this.#resolveEnded(reason);
  }

  #sendNext(): void {
    // The answer may come within `send`.
    if (this.#isSending) return;
    this.#isSending = true;
    while (!this.#inFlight && !this.#end) {
      this.#inFlight = this.#queue.shift();
      if (!this.#inFlight) break;
      this.#carrier.send(this.#inFlight.command, this.#inFlight.locality);
    }
    this.#isSending = false;
  }

  /** @param isAtOnce whatever becomes of it */
  #giveUp(waiting: Waiting, error: FrontendError, isAtOnce: boolean): void {
    if (waiting !== this.#inFlight) {
      const place = this.#queue.indexOf(waiting);
      if (place >= 0) this.#queue.splice(place, 1);
      waiting.reject(error);
      return;
    }
    waiting.givenUp ??= error;
    if (!this.#carrier.giveUp(error) || isAtOnce) waiting.reject(error);
  }
}

function checkCommand(command: Uint8Array, room: number): void {
  const most = Math.min(room, MAX_MESSAGE_BYTES);
  if (command.length < HEADER_BYTES || command.length > most) {
    throw new FrontendError(
      'bad-command',
      `a TPM command has ${HEADER_BYTES} to ${most} bytes here, this one has ${command.length}`,
    );
  }
  const announced = asBuffer(command).readUInt32BE(2);
  if (announced !== command.length) {
    throw new FrontendError(
      'bad-command',
      `the command announces ${announced} bytes and has ${command.length}`,
    );
  }
}
