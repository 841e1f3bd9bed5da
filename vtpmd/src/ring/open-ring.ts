import { availableParallelism } from 'node:os';
import { barrier } from 'vtpm-common/barrier';
import { hasHungUp, receiveNow, sendNow, yieldProcessor } from '../channels/socket-io.js';
import { STAY_COMMANDS, STAY_MICROSECONDS, STAY_MILLISECONDS } from '../channels/stay.js';
import { WatchedSocket } from '../channels/watched-socket.js';
import type { CheckpointKeeper } from '../checkpoint/keeper.js';
import type { CheckpointMemory } from '../checkpoint/memory.js';
import { errorResponse, MAX_COMMAND_BYTES, TPM_RC_COMMAND_SIZE, TPM_RC_LOCALITY } from '../engine/command.js';
import type { CommandQueue } from '../worker/command-queue.js';
import type { CommandSource } from '../worker/command-source.js';
import type { ClientKind } from '../worker/outage-policy.js';
import { RingPage, STATE } from './page.js';
import { MappedPages } from './page-memory.js';
import type { RingSetup } from './setup.js';

/** What answers need so that a worker after this one knows of them. */
export interface RingKeeping {
  readonly keeper: Pick<CheckpointKeeper, 'sequence' | 'takeAnswerNumber'>;
  readonly memory: Pick<CheckpointMemory, 'marks' | 'keepRingAnswer' | 'dropRingAnswer'>;
}

export interface RingParts {
  /** Names the connection to the workers that come after this one. */
  readonly id: number;
  readonly queue: Pick<CommandQueue, 'submit' | 'cancel'>;
  /** Absent where nothing outlives this worker. */
  readonly keeping?: RingKeeping | undefined;
}

export interface RingEvents {
  /** The frontend has left, or this end has: none of its commands runs. */
  closed(): void;
  /** The ring is of no use; it says why. */
  failed(why: string): void;
}

// Every ring looks at its command in the same memory: it is run or copied before the next look.
const lookBuffer = Buffer.alloc(MAX_COMMAND_BYTES);
const eventBuffer = Buffer.alloc(4096);
const NOTE = Buffer.of(0);
/** On a single processor the frontend could not go on while this end looks for its next command. */
const canSpin = availableParallelism() > 1;
/**
 * Looks at the page, about a microsecond, before others have a turn on this processor: the frontend may wait for it.
 */
const LOOKS = 256;

/**
 * The backend of one ring. A byte on the event channel says that the frontend changed the page; what counts is the page
 * alone, so bytes that are lost, left over or made up change nothing. As TpmConnection does, it stays outside of the event
 * loop for the frontend's next command, and here that needs no system call.
 *
 * Each command has its effect once, and its answer is given once, whenever the worker is killed. A request that is taken gets
 * a mark in its length: what was done last before it. The answer is kept beside the page before it takes the place of the
 * request there; then length and state become those of the answer in one store. So a page with a mark says that the newest
 * answer or checkpoint, if it came after that, is the answer to this request, and otherwise that the request did not run; and
 * one without a mark that nobody has taken it. See recover.ts.
 */
export class OpenRing implements CommandSource {
  command: Buffer = lookBuffer;
  readonly connection: number;
  readonly kind: ClientKind = 'tpm';
  readonly #parts: RingParts;
  readonly #events: RingEvents;
  readonly #pages: MappedPages;
  readonly #page: RingPage;
  readonly #eventFd: number;
  readonly #event: WatchedSocket;
  #isWaiting = false;
  #isClosed = false;
  #isOver = false;

  /** @param setup whose event channel is owned by the ring from now on */
  constructor(setup: RingSetup, parts: RingParts, events: RingEvents) {
    this.#parts = parts;
    this.#events = events;
    this.connection = parts.id;
    this.#pages = MappedPages.of(setup.page, setup.pageBytes);
    this.#page = new RingPage(this.#pages.bytes);
    this.#eventFd = setup.event;
    this.#event = new WatchedSocket(setup.event, () => this.#receive());
  }

  /** Serves it. @param isAdopted a worker before this one may have taken a request */
  start(isAdopted: boolean): void {
    this.#event.watch();
    if (!isAdopted) return;
    // The frontend may wait for a note that was never sent.
    this.#notify();
    const { claim, state } = this.#page;
    if (state === STATE.SUBMIT && claim !== undefined) this.#take(true);
    else this.#onEvent();
  }

  get isGone(): boolean {
    return this.#isClosed;
  }

  answer(response: Buffer): void {
    const isGiven = !this.#isClosed && response.length <= this.#page.room;
    if (isGiven) this.#give(response);
    // Not before: where the answer cannot be given the request must not be looked at again.
    this.#isWaiting = false;
    if (isGiven) this.#notify();
    else if (this.#isClosed) this.#over();
    else
      this.#events.failed(`an answer of ${response.length} bytes does not fit; give the ring an extra page`);
  }

  dropped(): void {
    this.#isWaiting = false;
    if (this.#isClosed) this.#over();
    else this.close();
  }

  /** Closes at once; a command that runs goes on without anybody to hear its answer. */
  close(): void {
    if (this.#isClosed) return;
    this.#isClosed = true;
    this.#event.destroy();
    this.#pages.release();
    if (!this.#isWaiting) this.#over();
  }

  #over(): void {
    if (this.#isOver) return;
    this.#isOver = true;
    this.#events.closed();
  }

  /** The frontend has this open file too, and may make it block (O_NONBLOCK): no system call here depends on that. */
  #receive(): void {
    const length = receiveNow(this.#eventFd, eventBuffer);
    if (length > 0) this.#onEvent();
    else if (length === 0 || hasHungUp(this.#eventFd)) this.close();
  }

  /** Only after a command: bytes alone are not worth waiting for more. */
  #onEvent(): void {
    if (this.#look() && canSpin) this.#stay();
  }

  #stay(): void {
    const end = performance.now() + STAY_MILLISECONDS;
    for (let count = 0; count < STAY_COMMANDS && performance.now() < end; count++) {
      if (this.#isWaiting || this.#isClosed || !this.#comes()) return;
      this.#look();
    }
  }

  /** Waits a little for the frontend's next command. */
  #comes(): boolean {
    const end = performance.now() + STAY_MICROSECONDS / 1000;
    do {
      for (let left = LOOKS; left > 0; left--) {
        const { state } = this.#page;
        if (state === STATE.SUBMIT || state === STATE.CANCEL) return true;
      }
      yieldProcessor();
    } while (performance.now() < end);
    return false;
  }

  /** @returns whether there was anything */
  #look(): boolean {
    if (this.#isClosed) return false;
    const { state } = this.#page;
    if (state === STATE.CANCEL) this.#cancel();
    else if (state === STATE.SUBMIT && !this.#isWaiting) this.#take(false);
    else return false;
    return true;
  }

  #take(isClaimed: boolean): void {
    const { locality, length } = this.#page.take(lookBuffer, isClaimed);
    const refusal = locality !== 0 ? TPM_RC_LOCALITY : length === undefined ? TPM_RC_COMMAND_SIZE : undefined;
    if (refusal !== undefined) {
      this.#put(errorResponse(refusal));
      this.#notify();
      return;
    }
    this.#page.claimAfter(this.#parts.keeping?.keeper.sequence ?? 0);
    barrier('after-claim');
    this.command = lookBuffer.subarray(0, length);
    this.#isWaiting = true;
    this.#parts.queue.submit(this);
  }

  #cancel(): void {
    if (this.#isWaiting) {
      if (!this.#parts.queue.cancel(this)) return;
      this.#isWaiting = false;
    }
    this.#page.idle();
    this.#notify();
  }

  #give(response: Buffer): void {
    const { keeping } = this.#parts;
    if (!keeping) {
      this.#put(response);
      return;
    }
    const { keeper, memory } = keeping;
    const number = keeper.takeAnswerNumber();
    memory.marks.begin(number, this.connection, this.command.length);
    barrier('before-ring-answer');
    memory.keepRingAnswer(number, this.connection, response);
    barrier('after-ring-answer');
    this.#put(response);
    barrier('after-finish');
    memory.marks.piped(number);
    memory.dropRingAnswer(response.length);
    barrier('before-notify');
  }

  #put(response: Buffer): void {
    this.#page.putResponse(response);
    barrier('before-finish');
    this.#page.finish(response.length);
  }

  /** Where it cannot be sent the frontend has bytes that it has not read. */
  #notify(): void {
    sendNow(this.#eventFd, NOTE);
  }
}
