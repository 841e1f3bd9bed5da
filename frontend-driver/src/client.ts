import type { Duplex } from 'node:stream';
import type { TpmChannel, TransmitOptions } from './channel.js';
import { type ConnectOptions, connectTo } from './connecting.js';
import { FrontendError } from './error.js';
import { MAX_MESSAGE_BYTES, MessageAssembler } from './framing.js';
import { TransmitQueue } from './transmit-queue.js';

/**
 * A way to the raw door of one vTPM. Giving up on the command that is on its way ends the connection: its late answer
 * would be taken for the next command's.
 *
 * @example
 * const tpm = await FrontendClient.connect('/run/vtpm-manager/vtpms/web1/tpm.sock');
 * const answer = await tpm.transmit(Buffer.from('80010000000c0000017b0008', 'hex'), { deadline: 1000 });
 * await tpm.close();
 */
export class FrontendClient implements TpmChannel {
  readonly canCancel = false;
  readonly #socket: Duplex;
  readonly #assembler = new MessageAssembler();
  readonly #queue: TransmitQueue;

  /** @throws FrontendError `unreachable`, with what stands in the way */
  static async connect(target: string | ConnectOptions): Promise<FrontendClient> {
    return new FrontendClient(await connectTo(typeof target === 'string' ? { path: target } : target));
  }

  /** @param socket carries raw commands and answers: a connection, a character device */
  constructor(socket: Duplex) {
    this.#socket = socket;
    this.#queue = new TransmitQueue({
      room: MAX_MESSAGE_BYTES,
      send: (command) => socket.write(command),
      giveUp: (error) => {
        const message = `the connection was given up with a command on its way: ${error.message}`;
        this.#finish(new FrontendError('closed', message), error);
        return false;
      },
    });
    socket.on('data', (chunk: Buffer) => this.#onData(chunk));
    socket.on('error', (cause: NodeJS.ErrnoException) => {
      const message = `the connection to the vTPM broke: ${cause.message}`;
      // A command is written whole or not at all.
      if (cause.syscall === 'write') this.#finish(new FrontendError('closed', message, cause));
      else this.#broke(message, cause);
    });
    socket.on('close', () => this.#broke('the vTPM closed the connection'));
  }

  get ended(): Promise<FrontendError> {
    return this.#queue.ended;
  }

  /** As TpmChannel; `locality` must be 0. */
  async transmit(command: Uint8Array, options: TransmitOptions = {}): Promise<Buffer> {
    const { locality = 0 } = options;
    if (locality !== 0) {
      throw new FrontendError(
        'locality',
        `the raw channel carries no locality: locality ${locality} cannot be asked for here, only 0`,
      );
    }
    return await this.#queue.transmit(command, options);
  }

  async close(): Promise<void> {
    this.#finish(new FrontendError('closed', 'the connection was closed on this side'));
    if (!this.#socket.closed) await new Promise<void>((resolve) => this.#socket.once('close', resolve));
  }

  #onData(chunk: Buffer): void {
    if (this.#queue.isOver) return;
    let answers: Buffer[];
    try {
      answers = this.#assembler.push(chunk);
    } catch (error) {
      this.#finish(error as FrontendError);
      return;
    }
    const answer = answers[0];
    const isTooMuch = answers.length > 1 || (answer !== undefined && this.#assembler.pendingBytes > 0);
    if (!this.#queue.isWaiting || isTooMuch) {
      this.#finish(new FrontendError('protocol', 'the vTPM sent more than one answer to one command'));
      return;
    }
    if (answer) this.#queue.answered(answer);
  }

  #broke(message: string, cause?: unknown): void {
    this.#finish(new FrontendError('closed', message, cause), lost(message, cause));
  }

  #finish(reason: FrontendError, ofInFlight = reason): void {
    if (this.#queue.isOver) return;
    this.#queue.end(reason, ofInFlight);
    this.#socket.destroy();
  }
}

/** Of the command that was on its way. */
export function lost(why: string, cause?: unknown): FrontendError {
  return new FrontendError('lost', `${why}; whether the TPM ran the command is not known`, cause);
}
