import { type ConnectOpts, Socket, type SocketConstructorOpts } from 'node:net';
import { barrier } from 'vtpm-common/barrier';
import { socketFd } from 'vtpm-common/libc';
import { HEADER_BYTES, MAX_COMMAND_BYTES } from '../engine/command.js';
import type { Locality } from '../engine/engine.js';
import type { CommandQueue } from '../worker/command-queue.js';
import type { CommandSource } from '../worker/command-source.js';
import type { ClientKind } from '../worker/outage-policy.js';
import { CommandReader } from './command-reader.js';
import { type Frame, framed, type Localities, localityOf, ONLY_ZERO } from './framing.js';
import type { HandleOwner } from './handle-owners.js';
import { hasHungUp, receiveNow, sendNow, waitReadable } from './socket-io.js';
import { STAY_COMMANDS, STAY_MICROSECONDS, STAY_MILLISECONDS } from './stay.js';

// Every connection reads into the same memory: what is read is run or copied before the next read.
const receiveBuffer = Buffer.alloc(MAX_COMMAND_BYTES);

// Only a fault test pays for splitting an answer.
const isHooked = Symbol.for('vtpm.barrier') in globalThis;

export interface TpmConnectionOptions {
  /** Called once: the connection is closed and none of its commands runs. */
  onClosed(connection: TpmConnection): void;
  /** Of what its commands load, where that is to be flushed. */
  readonly owner?: HandleOwner | undefined;
  /** Says how long its commands wait for a manager that is away. */
  readonly kind?: ClientKind;
  readonly localities?: Localities;
  /** Hears when a command has no answer yet, and when it has. */
  note?(taken: 'bare' | 'framed' | undefined): void;
}

/**
 * A client's connection that carries raw TPM commands and answers, one command at a time.
 *
 * The path of a command is short: the event loop delivers it, the queue runs it, the answer is written directly, and
 * then the connection stays outside of the event loop for the client's next command, for a bounded time. libuv and the
 * direct calls share the descriptor on one thread, so bytes keep their order; what the stay leaves behind (end of
 * stream, errors) the event loop sees again.
 */
export class TpmConnection implements CommandSource {
  command: Buffer = receiveBuffer;
  frame: Frame | undefined;
  locality: Locality = 0;
  refusal: number | undefined;
  readonly owner: HandleOwner | undefined;
  readonly kind: ClientKind;
  readonly fd: number;
  readonly #socket: Socket;
  readonly #queue: Pick<CommandQueue, 'submit'>;
  readonly #options: TpmConnectionOptions;
  readonly #reader = new CommandReader();
  #commands = 0;
  #isWaiting = false;
  #isEnded = false;
  #isClosed = false;
  #isClosing = false;
  #isPaused = false;
  #isStaying = false;

  /**
   * @param peer a descriptor, owned by the connection from now on, or an accepted socket that allows half-open
   */
  constructor(peer: number | Socket, queue: Pick<CommandQueue, 'submit'>, options: TpmConnectionOptions) {
    this.#queue = queue;
    this.#options = options;
    this.owner = options.owner;
    this.kind = options.kind ?? 'tpm';
    if (peer instanceof Socket) {
      this.#socket = peer;
      this.fd = socketFd(peer);
      peer.on('data', (chunk: Buffer) => {
        if (!this.#onData(chunk)) peer.pause();
      });
    } else {
      this.fd = peer;
      const options: SocketConstructorOpts & ConnectOpts = {
        fd: peer,
        allowHalfOpen: true,
        onread: {
          buffer: receiveBuffer,
          callback: (length) => this.#onData(receiveBuffer.subarray(0, length)),
        },
      };
      this.#socket = new Socket(options);
    }
    this.#socket.on('end', () => {
      this.#isEnded = true;
      this.#closeIfDone();
    });
    this.#socket.on('error', () => {});
    this.#socket.on('close', () => {
      this.#isClosed = true;
      if (!this.#isWaiting) this.#options.onClosed(this);
    });
    this.#socket.resume();
  }

  /** How many commands came. */
  get commands(): number {
    return this.#commands;
  }

  get isGone(): boolean {
    // From this moment the descriptor is closed, and its number may be another connection's; `close` comes later.
    return this.#socket.destroyed;
  }

  hasLeft(): boolean {
    return !this.isGone && hasHungUp(this.fd);
  }

  answer(response: Buffer): void {
    this.#isWaiting = false;
    if (this.#isClosed) {
      this.#options.onClosed(this);
      return;
    }
    if (this.isGone) return;
    this.#write(this.frame ? framed(response) : response);
    this.#options.note?.(undefined);
    this.#next();
  }

  dropped(): void {
    this.#isWaiting = false;
    if (this.#isClosed) this.#options.onClosed(this);
  }

  /** Closes at once; a command that runs goes on without anybody to hear its answer. */
  close(): void {
    this.#socket.destroy();
  }

  /** @returns false where no more is to be read for now: a client may send ahead of its answers, but not without bound */
  #onData(chunk: Buffer): boolean {
    this.#receive(chunk);
    if (this.#isAtRest()) this.#stay();
    this.#isPaused = this.#isBlocked() && this.#reader.pendingBytes >= MAX_COMMAND_BYTES;
    return !this.#isPaused;
  }

  /** The next command waits: for the answer to the one before it, or until the client takes its answers. */
  #isBlocked(): boolean {
    return this.#isWaiting || this.#socket.writableLength > 0;
  }

  #isAtRest(): boolean {
    return !this.#isBlocked() && !this.#isClosing && !this.isGone && this.#reader.pendingBytes === 0;
  }

  /** Takes commands straight from the descriptor while the client keeps them coming. */
  #stay(): void {
    this.#isStaying = true;
    const end = performance.now() + STAY_MILLISECONDS;
    for (let count = 0; count < STAY_COMMANDS && performance.now() < end; count++) {
      if (!waitReadable(this.fd, STAY_MICROSECONDS)) break;
      const length = receiveNow(this.fd, receiveBuffer);
      if (length <= 0) break;
      this.#receive(receiveBuffer.subarray(0, length));
      if (!this.#isAtRest()) break;
    }
    this.#isStaying = false;
    this.#closeIfDone();
  }

  #receive(chunk: Buffer): void {
    if (this.#isClosing) return;
    const isOneCommand =
      !this.#isBlocked() &&
      this.#reader.pendingBytes === 0 &&
      chunk.length >= HEADER_BYTES &&
      chunk.readUInt32BE(2) === chunk.length;
    if (isOneCommand) {
      this.#submit(chunk, undefined);
      return;
    }
    this.#reader.push(chunk);
    this.#next();
  }

  #next(): void {
    if (this.#isBlocked() || this.#isClosing || this.isGone) return;
    const message = this.#reader.next();
    if (message) {
      this.#submit(message.command, message.frame);
      return;
    }
    if (this.#isPaused) {
      this.#isPaused = false;
      this.#socket.resume();
    }
    if (!this.#isStaying) this.#closeIfDone();
  }

  #submit(command: Buffer, frame: Frame | undefined): void {
    const { localities = ONLY_ZERO, note } = this.#options;
    note?.(frame ? 'framed' : 'bare');
    this.frame = frame;
    this.refusal = frame?.refusal(localities);
    this.locality = localityOf(frame, localities);
    this.#isWaiting = true;
    this.#commands++;
    this.command = command;
    this.#queue.submit(this);
  }

  /** A direct write; what does not fit goes through the event loop, and the next command waits for that. */
  #write(response: Buffer): void {
    if (isHooked) {
      const half = response.length >> 1;
      this.#writeDirect(response.subarray(0, half));
      barrier('half-answer');
      this.#writeDirect(response.subarray(half));
    } else {
      this.#writeDirect(response);
    }
  }

  #writeDirect(bytes: Buffer): void {
    const sent = this.#socket.writableLength === 0 ? sendNow(this.fd, bytes) : 0;
    if (sent < bytes.length) this.#socket.write(Buffer.from(bytes.subarray(sent)), () => this.#next());
  }

  /** After the client's last command is answered, or after a frame that nothing can follow. */
  #closeIfDone(): void {
    if (this.#isBlocked() || this.#isClosing || this.isGone) return;
    if (!this.#isEnded && !this.#reader.isBroken) return;
    this.#isClosing = true;
    this.#socket.end(() => this.#socket.destroy());
  }
}
