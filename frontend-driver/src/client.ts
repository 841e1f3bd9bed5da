import { connect, type Socket } from 'node:net';
import { FrontendError } from './error.js';
import { asBuffer, HEADER_BYTES, MAX_MESSAGE_BYTES, MessageAssembler } from './framing.js';

export interface ConnectOptions {
  /** A vTPM's raw door, `tpm.sock`. */
  readonly path: string;
  /** Milliseconds to wait for the connection; 5000 unless given. */
  readonly timeout?: number;
}

export interface TransmitOptions {
  /** Only 0: the raw channel carries no locality. */
  readonly locality?: number;
  readonly signal?: AbortSignal;
  /** Milliseconds from this call, time in the queue included. */
  readonly deadline?: number;
}

/**
 * A connection to one vTPM.
 *
 * A TPM answers one command at a time and its answers carry no number, so commands wait in a queue and only the
 * first is on its way. Giving up on that one ends the connection: its late answer would be taken for the next
 * command's. Commands that still wait can be given up without harm.
 *
 * @example
 * const tpm = await FrontendClient.connect('/run/vtpm-manager/vtpms/web1/tpm.sock');
 * const answer = await tpm.transmit(Buffer.from('80010000000c0000017b0008', 'hex'), { deadline: 1000 });
 * await tpm.close();
 */
export class FrontendClient {
  readonly #socket: Socket;
  readonly #assembler = new MessageAssembler();
  readonly #queue: Waiting[] = [];
  #inFlight: Waiting | undefined;
  #end: FrontendError | undefined;
  readonly #ended: Promise<FrontendError>;
  #resolveEnded: (reason: FrontendError) => void = () => {};

  /** @throws FrontendError `unreachable`, with what stands in the way */
  static async connect(target: string | ConnectOptions): Promise<FrontendClient> {
    const { path, timeout = 5000 } = typeof target === 'string' ? { path: target } : target;
    const socket = connect({ path });
    const giveUp = setTimeout(
      () => socket.destroy(Object.assign(new Error('no answer'), { code: 'ETIMEDOUT' })),
      timeout,
    );
    try {
      await new Promise<void>((resolve, reject) => {
        socket.once('connect', () => {
          socket.off('error', reject);
          resolve();
        });
        socket.once('error', reject);
      });
    } catch (cause) {
      throw new FrontendError('unreachable', whyUnreachable(path, cause, timeout), cause);
    } finally {
      clearTimeout(giveUp);
    }
    return new FrontendClient(socket);
  }

  private constructor(socket: Socket) {
    this.#socket = socket;
    this.#ended = new Promise((resolve) => {
      this.#resolveEnded = resolve;
    });
    socket.on('data', (chunk: Buffer) => this.#onData(chunk));
    socket.on('error', (cause) => {
      this.#finish(new FrontendError('closed', `the connection to the vTPM broke: ${cause.message}`, cause));
    });
    socket.on('close', () => this.#finish(new FrontendError('closed', 'the vTPM closed the connection')));
  }

  /** Settles, never rejects, when the connection is over, with the reason. */
  get ended(): Promise<FrontendError> {
    return this.#ended;
  }

  /**
   * Sends one whole TPM command and returns its answer, at most 4096 bytes, whatever its response code.
   * @throws FrontendError `bad-command` and `locality` before anything is sent; `aborted`, `deadline`, `protocol`,
   * `closed` as their names say
   */
  async transmit(command: Uint8Array, options: TransmitOptions = {}): Promise<Buffer> {
    const { locality = 0, signal, deadline } = options;
    checkCommand(command);
    if (locality !== 0) {
      throw new FrontendError(
        'locality',
        `the raw channel carries no locality: locality ${locality} cannot be asked for here, only 0`,
      );
    }
    if (signal?.aborted) throw new FrontendError('aborted', 'given up before it was sent', signal.reason);
    if (this.#end) throw this.#end;
    return await new Promise<Buffer>((resolve, reject) => {
      const onAbort = () => this.#giveUp(waiting, new FrontendError('aborted', 'given up', signal?.reason));
      const timer =
        deadline === undefined
          ? undefined
          : setTimeout(() => {
              const message = `no answer within ${deadline} ms`;
              this.#giveUp(waiting, new FrontendError('deadline', message));
            }, deadline);
      const release = () => {
        clearTimeout(timer);
        signal?.removeEventListener('abort', onAbort);
      };
      const waiting: Waiting = {
        // A copy: the caller may reuse its buffer while the command waits.
        command: Buffer.from(command),
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

  /** Ends the connection. Commands that have no answer yet are rejected with `closed`. */
  async close(): Promise<void> {
    this.#finish(new FrontendError('closed', 'the connection was closed on this side'));
    if (!this.#socket.closed) await new Promise<void>((resolve) => this.#socket.once('close', resolve));
  }

  #sendNext(): void {
    if (this.#inFlight || this.#end) return;
    this.#inFlight = this.#queue.shift();
    if (this.#inFlight) this.#socket.write(this.#inFlight.command);
  }

  #onData(chunk: Buffer): void {
    if (this.#end) return;
    let answers: Buffer[];
    try {
      answers = this.#assembler.push(chunk);
    } catch (error) {
      this.#finish(error as FrontendError);
      return;
    }
    const answer = answers[0];
    const isTooMuch = answers.length > 1 || (answer !== undefined && this.#assembler.pendingBytes > 0);
    if (!this.#inFlight || isTooMuch) {
      this.#finish(new FrontendError('protocol', 'the vTPM sent more than one answer to one command'));
      return;
    }
    if (!answer) return;
    const waiting = this.#inFlight;
    this.#inFlight = undefined;
    waiting.resolve(answer);
    this.#sendNext();
  }

  #giveUp(waiting: Waiting, error: FrontendError): void {
    if (waiting === this.#inFlight) {
      this.#inFlight = undefined;
      waiting.reject(error);
      this.#finish(
        new FrontendError(
          'closed',
          `the connection was given up with a command on its way: ${error.message}`,
        ),
      );
      return;
    }
    const place = this.#queue.indexOf(waiting);
    if (place >= 0) this.#queue.splice(place, 1);
    waiting.reject(error);
  }

  #finish(reason: FrontendError): void {
    if (this.#end) return;
    this.#end = reason;
    this.#socket.destroy();
    const left = this.#inFlight ? [this.#inFlight, ...this.#queue] : [...this.#queue];
    this.#inFlight = undefined;
    this.#queue.length = 0;
    for (const waiting of left) waiting.reject(reason);
    this.#resolveEnded(reason);
  }
}

interface Waiting {
  readonly command: Buffer;
  resolve(answer: Buffer): void;
  reject(error: FrontendError): void;
}

function checkCommand(command: Uint8Array): void {
  if (command.length < HEADER_BYTES || command.length > MAX_MESSAGE_BYTES) {
    throw new FrontendError(
      'bad-command',
      `a TPM command has ${HEADER_BYTES} to ${MAX_MESSAGE_BYTES} bytes, this one has ${command.length}`,
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

function whyUnreachable(path: string, cause: unknown, timeout: number): string {
  switch ((cause as NodeJS.ErrnoException).code) {
    case 'ENOENT':
      return `there is no socket ${path}: the vTPM is not running, or its name is another`;
    case 'ECONNREFUSED':
      return `nobody answers at ${path}: the vTPM is not running`;
    case 'EACCES':
    case 'EPERM':
      return `${path} may not be opened by this user`;
    case 'ETIMEDOUT':
      return `no connection to ${path} within ${timeout} ms`;
    default:
      return `${path} cannot be reached: ${cause instanceof Error ? cause.message : String(cause)}`;
  }
}
