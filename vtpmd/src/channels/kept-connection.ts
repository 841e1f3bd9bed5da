import type { AnswerPipe } from '../checkpoint/answer-pipe.js';
import type { CheckpointKeeper } from '../checkpoint/keeper.js';
import type { Locality } from '../engine/engine.js';
import type { CommandQueue } from '../worker/command-queue.js';
import type { CommandSource } from '../worker/command-source.js';
import type { ClientKind } from '../worker/outage-policy.js';
import {
  type Frame,
  framed,
  type Localities,
  localityOf,
  MAX_FRAMED_BYTES,
  ONLY_ZERO,
  readMessage,
} from './framing.js';
import type { HandleOwner } from './handle-owners.js';
import {
  discardLeft,
  hasEnded,
  hasHungUp,
  isWritable,
  peekNow,
  setPeekOffset,
  waitReadable,
} from './socket-io.js';
import { STAY_COMMANDS, STAY_MICROSECONDS, STAY_MILLISECONDS } from './stay.js';
import { WatchedSocket } from './watched-socket.js';

/** So many answers of the largest size fit into what is free of a send buffer that is writable. */
const ANSWERS_PER_CHECK = 16;
/** When a part of a command, or a client that does not read, is looked at again. */
const FIRST_RETRY_MS = 1;
const LONGEST_RETRY_MS = 100;

// Every connection looks at its command in the same memory: it is run or copied before the next look.
const lookBuffer = Buffer.alloc(MAX_FRAMED_BYTES);

export interface KeptConnectionOptions {
  /** Names the connection to the workers that come after this one. */
  readonly id: number;
  readonly queue: Pick<CommandQueue, 'submit'>;
  readonly keeper: CheckpointKeeper;
  readonly pipe: AnswerPipe;
  readonly owner?: HandleOwner | undefined;
  readonly kind?: ClientKind;
  readonly localities?: Localities;
  /** Commands that came to workers before this one. */
  readonly commands?: number;
  /** Called once: the connection is closed and none of its commands runs. */
  onClosed(connection: KeptConnection): void;
  /** `commands` became more than one. */
  onBusy?(): void;
}

/**
 * A client's connection that outlives the worker: a command stays in the socket until its answer is sure to be given, and
 * both happen once; see AnswerPipe. The event loop only says that there is something to read. As in TpmConnection the
 * connection stays outside of the event loop for the client's next command.
 */
export class KeptConnection implements CommandSource {
  command: Buffer = lookBuffer;
  frame: Frame | undefined;
  locality: Locality = 0;
  refusal: number | undefined;
  readonly connection: number;
  readonly owner: HandleOwner | undefined;
  readonly kind: ClientKind;
  readonly fd: number;
  readonly #options: KeptConnectionOptions;
  readonly #socket: WatchedSocket;
  #commands: number;
  /** Of the command in the socket, with its frame. */
  #length = 0;
  #answers = ANSWERS_PER_CHECK;
  #isWaiting = false;
  #isClosed = false;
  #isBroken = false;
  #isLooking = false;
  #timer: NodeJS.Timeout | undefined;
  #retryMs = FIRST_RETRY_MS;

  /** @param fd owned by the connection from now on */
  constructor(fd: number, options: KeptConnectionOptions) {
    this.fd = fd;
    this.#options = options;
    this.connection = options.id;
    this.owner = options.owner;
    this.kind = options.kind ?? 'tpm';
    this.#commands = options.commands ?? 0;
    this.#socket = new WatchedSocket(fd, () => this.#onReadable());
  }

  /** Serves it; before that nothing is read. */
  start(): void {
    setPeekOffset(this.fd, 0);
    this.#onReadable();
  }

  /** How many commands came. */
  get commands(): number {
    return this.#commands;
  }

  get isGone(): boolean {
    return this.#isClosed;
  }

  hasLeft(): boolean {
    return !this.#isClosed && hasHungUp(this.fd);
  }

  answer(response: Buffer): void {
    this.#isWaiting = false;
    if (this.#isClosed) {
      this.#options.onClosed(this);
      return;
    }
    const { keeper, pipe } = this.#options;
    this.#answers++;
    const answer = this.frame ? framed(response) : response;
    if (!pipe.deliver(keeper, this, this.#length, answer) || this.#isBroken) this.close();
    else if (!this.#isLooking) this.#socket.watch();
  }

  dropped(): void {
    this.#isWaiting = false;
    if (this.#isClosed) this.#options.onClosed(this);
    else this.close();
  }

  /** Closes at once; a command that runs goes on without anybody to hear its answer. */
  close(): void {
    if (this.#isClosed) return;
    this.#isClosed = true;
    clearTimeout(this.#timer);
    discardLeft(this.fd, lookBuffer);
    this.#socket.destroy();
    if (!this.#isWaiting) this.#options.onClosed(this);
  }

  #onReadable(): void {
    this.#isLooking = true;
    this.#look();
    if (this.#isAtRest()) this.#stay();
    this.#isLooking = false;
    if (this.#isAtRest()) this.#socket.watch();
    else this.#socket.unwatch();
  }

  #isAtRest(): boolean {
    return !this.#isWaiting && !this.#isClosed && this.#timer === undefined;
  }

  #stay(): void {
    const end = performance.now() + STAY_MILLISECONDS;
    for (let count = 0; count < STAY_COMMANDS && performance.now() < end; count++) {
      if (!waitReadable(this.fd, STAY_MICROSECONDS)) return;
      this.#look();
      if (!this.#isAtRest()) return;
    }
  }

  /** Runs the command that is there. */
  #look(): void {
    // A VMM may have this end too, and fill it itself or make it smaller.
    if (this.#answers >= ANSWERS_PER_CHECK || this.kind === 'vmm-data') {
      if (!isWritable(this.fd)) {
        this.#lookLater();
        return;
      }
      this.#answers = 0;
    }
    const there = peekNow(this.fd, lookBuffer);
    if (there === -1) return;
    if (there <= 0) {
      this.close();
      return;
    }
    const message = readMessage(lookBuffer.subarray(0, there));
    if (!message) {
      setPeekOffset(this.fd, 0);
      if (hasEnded(this.fd)) this.close();
      else this.#lookLater();
      return;
    }
    this.#retryMs = FIRST_RETRY_MS;
    // With the answer given, the offset must say whether this command was taken.
    const { length, command, frame } = message;
    if (there !== length) setPeekOffset(this.fd, length);
    const { localities = ONLY_ZERO } = this.#options;
    this.#isBroken = message.isBroken;
    this.#length = length;
    this.command = command;
    this.frame = frame;
    this.refusal = frame?.refusal(localities);
    this.locality = localityOf(frame, localities);
    this.#isWaiting = true;
    this.#commands++;
    if (this.#commands === 2) this.#options.onBusy?.();
    this.#options.queue.submit(this);
  }

  #lookLater(): void {
    this.#timer = setTimeout(() => {
      this.#timer = undefined;
      if (!this.#isClosed) this.#onReadable();
    }, this.#retryMs);
    this.#retryMs = Math.min(2 * this.#retryMs, LONGEST_RETRY_MS);
  }
}
