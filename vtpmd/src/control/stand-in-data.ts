import { framed, MAX_FRAMED_BYTES, readMessage } from '../channels/framing.js';
import { hasEnded, peekNow, receiveNow, sendNow, setPeekOffset } from '../channels/socket-io.js';
import { WatchedSocket } from '../channels/watched-socket.js';
import { errorResponse, TPM_RC_FAILURE } from '../engine/command.js';
import type { DataConnection } from './data-channel.js';

const REST_PAUSE_MS = 10;
const lookBuffer = Buffer.alloc(MAX_FRAMED_BYTES);

export interface StandInDataParts {
  /** The TPM counts as on: a command waits for it. */
  readonly isOn: () => boolean;
  /** A command waits. */
  command(): void;
  /** The VMM has closed it. */
  onClosed(connection: StandInData): void;
}

/**
 * A VMM's data channel without a TPM behind it. Where that is off each command is answered with TPM_RC_FAILURE; where it is
 * away a command stays in the socket, for the worker that comes with the TPM.
 */
export class StandInData implements DataConnection {
  readonly fd: number;
  readonly #parts: StandInDataParts;
  readonly #socket: WatchedSocket;
  #timer: NodeJS.Timeout | undefined;
  #isGone = false;

  /** @param fd owned by this from now on */
  constructor(fd: number, parts: StandInDataParts) {
    this.fd = fd;
    this.#parts = parts;
    this.#socket = new WatchedSocket(fd, () => this.#look());
    this.#socket.watch();
  }

  get isGone(): boolean {
    return this.#isGone;
  }

  close(): void {
    if (this.#isGone) return;
    this.release();
    this.#parts.onClosed(this);
  }

  /** It is another worker's now. */
  release(): void {
    this.#isGone = true;
    clearTimeout(this.#timer);
    this.#socket.destroy();
  }

  /** The TPM was switched off: what waits is answered. */
  lookAgain(): void {
    if (!this.#isGone) this.#socket.watch();
  }

  #look(): void {
    // The worker before this one may have left it anywhere.
    setPeekOffset(this.fd, 0);
    const there = peekNow(this.fd, lookBuffer);
    if (there === -1) return;
    if (there <= 0) {
      this.close();
    } else if (this.#parts.isOn()) {
      this.#socket.unwatch();
      this.#parts.command();
    } else {
      this.#fail(lookBuffer.subarray(0, there));
    }
  }

  #fail(received: Buffer): void {
    const message = readMessage(received);
    if (message) {
      const { length, frame } = message;
      receiveNow(this.fd, lookBuffer.subarray(0, length));
      const answer = errorResponse(TPM_RC_FAILURE);
      sendNow(this.fd, frame ? framed(answer) : answer);
      if (message.isBroken) this.close();
    } else if (hasEnded(this.fd)) {
      this.close();
    } else {
      this.#socket.unwatch();
      this.#timer = setTimeout(() => this.#socket.watch(), REST_PAUSE_MS);
    }
  }
}
