import { hash } from 'node:crypto';
import { barrier } from 'vtpm-common/barrier';
import { discardLeft, hasEnded, peekNow, receiveNow, setPeekOffset } from '../channels/socket-io.js';
import { WatchedSocket } from '../channels/watched-socket.js';
import type { AnswerNumbers, AnswerPipe } from '../checkpoint/answer-pipe.js';
import type { Answered } from '../checkpoint/unit.js';
import { shapeOf } from './commands.js';
import { type ControlRequest, type Reading, readRequest, response } from './request.js';
import { RESULT } from './results.js';

/** A request that does not go on for so long is not going to. */
const REQUEST_LIMIT_MS = 500;
const FIRST_RETRY_MS = 1;
const LONGEST_RETRY_MS = 50;
/** Of a longer request the client's socket does not hold all, so its beginning must be taken before its end is there. */
const MOST_LEFT_BYTES = 160 * 1024;
/** More than any body, and more than any client pads. */
const LOOK_BYTES = 4096;

/** Who waits for an answer. */
export interface Asker {
  readonly connection: number;
  readonly fd: number;
  /** Bytes of the request that are in the socket. */
  readonly length: number;
  /** What a checkpoint says of this request once it is done. */
  answered(response: Buffer): Answered;
  answer(response: Buffer): void;
}

export interface ControlConnectionOptions {
  /** Names the connection to the workers that come after this one. */
  readonly id: number;
  readonly pipe: AnswerPipe;
  readonly numbers: AnswerNumbers;
  /** Where it is noted that a part of a request was taken. */
  readonly notes: { torn: number };
  serve(request: ControlRequest, asker: Asker): void;
  onClosed(): void;
}

/**
 * A VMM's control connection, which outlives the worker. A request stays in its socket while it is done, and is taken with its
 * answer, which is given once (AnswerPipe): whoever comes after a kill -9 finds the request and no answer, or neither.
 * Receiving without room for descriptors makes the kernel close those that come along, so none is ever left open here. As in
 * KeptConnection the event loop only says that there is something to read.
 */
export class ControlConnection {
  readonly id: number;
  readonly fd: number;
  readonly #options: ControlConnectionOptions;
  readonly #socket: WatchedSocket;
  #buffer = Buffer.alloc(LOOK_BYTES);
  /** Bytes of the request so far, and how many of them are not in the socket any more. */
  #there = 0;
  #taken = 0;
  #progressAt = 0;
  #retryMs = FIRST_RETRY_MS;
  #timer: NodeJS.Timeout | undefined;
  #isBusy = false;
  #isClosed = false;

  /** @param fd owned by the connection from now on */
  constructor(fd: number, options: ControlConnectionOptions) {
    this.id = options.id;
    this.fd = fd;
    this.#options = options;
    this.#socket = new WatchedSocket(fd, () => this.#look());
  }

  /** Serves it; before that nothing is read. */
  start(): void {
    if (this.#options.notes.torn === this.id) {
      // The beginning of its request was in the worker before this one.
      this.#options.notes.torn = 0;
      this.close();
      return;
    }
    setPeekOffset(this.fd, 0);
    this.#look();
  }

  get isClosed(): boolean {
    return this.#isClosed;
  }

  /** The client is gone, whether the event loop has seen it or not, and nothing that it asked for is left to do. */
  get hasLeft(): boolean {
    if (this.#isClosed) return true;
    if (this.#isBusy || this.#there > 0 || !hasEnded(this.fd)) return false;
    const count = peekNow(this.fd, this.#buffer);
    // A request that is there is still to be done.
    setPeekOffset(this.fd, 0);
    return count === 0;
  }

  close(): void {
    if (this.#isClosed) return;
    this.#isClosed = true;
    clearTimeout(this.#timer);
    discardLeft(this.fd, this.#buffer);
    this.#socket.destroy();
    this.#options.onClosed();
  }

  /** It is another worker's now: what is in the socket stays there. */
  release(): void {
    this.#isClosed = true;
    clearTimeout(this.#timer);
    this.#socket.destroy();
  }

  #look(): void {
    if (this.#isBusy || this.#isClosed) return;
    clearTimeout(this.#timer);
    for (;;) {
      const count = this.#receive();
      // What the client asked for before it went is done, as with one that goes while it is done.
      if (count === -1 || (count === 0 && this.#there > 0)) break;
      if (count <= 0) {
        this.close();
        return;
      }
      this.#there += count;
      this.#progressAt = performance.now();
      this.#retryMs = FIRST_RETRY_MS;
    }
    if (this.#there === 0) {
      this.#socket.watch();
      return;
    }
    this.#socket.unwatch();
    const reading = readRequest(this.#buffer.subarray(0, this.#there));
    if (reading.kind === 'partial') this.#waitFor(reading.least);
    else this.#serve(reading);
  }

  /** As `peekNow`; -1, too, where no more belongs to the request. */
  #receive(): number {
    if (this.#there === this.#buffer.length) {
      if (readRequest(this.#buffer).kind !== 'partial') return -1;
      const larger = Buffer.alloc(2 * this.#buffer.length);
      larger.set(this.#buffer);
      this.#buffer.fill(0);
      this.#buffer = larger;
    }
    if (this.#there - this.#taken >= MOST_LEFT_BYTES) this.#take();
    return peekNow(this.fd, this.#buffer.subarray(this.#there));
  }

  /** What was looked at leaves the socket, so that the client can go on writing. */
  #take(): void {
    this.#options.notes.torn = this.id;
    while (this.#taken < this.#there) {
      const count = receiveNow(this.fd, this.#buffer.subarray(this.#taken, this.#there));
      if (count <= 0) return;
      this.#taken += count;
    }
  }

  #waitFor(least: number): void {
    if (hasEnded(this.fd)) {
      this.close();
    } else if (performance.now() - this.#progressAt > REQUEST_LIMIT_MS) {
      this.#serve(readAnyway(this.#buffer.subarray(0, this.#there), least));
    } else {
      this.#timer = setTimeout(() => this.#look(), this.#retryMs);
      this.#retryMs = Math.min(2 * this.#retryMs, LONGEST_RETRY_MS);
    }
  }

  #serve(reading: Exclude<Reading, { kind: 'partial' }>): void {
    this.#isBusy = true;
    const received = this.#buffer.subarray(0, this.#there);
    const asker: Asker = {
      connection: this.id,
      fd: this.fd,
      length: this.#there - this.#taken,
      answered: (answer) => ({
        isControl: true,
        connection: this.id,
        commandLength: asker.length,
        commandDigest: hash('sha256', received.subarray(this.#taken), 'buffer'),
        response: answer,
      }),
      answer: (answer) => this.#answer(answer),
    };
    // More than any client pads is there: nobody knows where the next request begins.
    const isFlooded =
      this.#there >= LOOK_BYTES && 'request' in reading && reading.request.content.length === 0;
    if ('request' in reading && !isFlooded) {
      this.#options.serve(reading.request, asker);
      return;
    }
    const kind = 'request' in reading ? 'malformed' : reading.kind;
    const { shape } = 'request' in reading ? reading.request : { shape: undefined, ...reading };
    this.#answer(response(shape, REFUSALS[kind]));
    if (isFlooded || reading.kind === 'endless') this.close();
  }

  #answer(answer: Buffer): void {
    if (this.#isClosed) return;
    const { notes } = this.#options;
    barrier('control-before-answer');
    const isTaken = this.#deliver(answer);
    if (this.#taken > 0) notes.torn = 0;
    // Contents are state, which has secrets.
    this.#buffer.fill(0, 0, this.#there);
    if (this.#buffer.length > LOOK_BYTES) this.#buffer = Buffer.alloc(LOOK_BYTES);
    this.#there = this.#taken = 0;
    this.#isBusy = false;
    if (isTaken) setImmediate(() => this.#look());
    else this.close();
  }

  #deliver(answer: Buffer): boolean {
    const { pipe, numbers } = this.#options;
    const to = { fd: this.fd, connection: this.id };
    const length = this.#there - this.#taken;
    try {
      return pipe.deliver(numbers, to, length, answer);
    } catch (error) {
      // A state is larger than what the supervisor's user may have in pipes.
      if (answer.length <= LOOK_BYTES) throw error;
      return pipe.deliver(numbers, to, length, response(shapeOf(this.#buffer.readUInt32BE(0)), RESULT.Fail));
    }
  }
}

const REFUSALS = {
  unknown: RESULT.BadOrdinal,
  malformed: RESULT.BadParameter,
  endless: RESULT.Fail,
} as const;

/** What did not come to its end in time. */
function readAnyway(received: Buffer, least: number): Exclude<Reading, { kind: 'partial' }> {
  const padded = Buffer.alloc(Math.max(least, received.length));
  padded.set(received);
  const reading = readRequest(padded);
  if ('request' in reading) return { kind: 'malformed', shape: reading.request.shape };
  return reading.kind === 'partial' ? { kind: 'unknown' } : reading;
}
