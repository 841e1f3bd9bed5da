import { barrier } from 'vtpm-common/barrier';
import { MAX_FRAMED_BYTES } from '../channels/framing.js';
import {
  drainPipe,
  hasHungUp,
  peekOffset,
  pipeHolds,
  receiveNow,
  spliceNow,
  waitWritable,
  writeNow,
} from '../channels/socket-io.js';
import { MAX_COMMAND_BYTES } from '../engine/command.js';
import { VtpmdError } from '../error.js';
import type { CheckpointKeeper } from './keeper.js';
import type { CheckpointMemory } from './memory.js';

/** Nobody but a client that does not read for so long makes an answer wait. */
const SPLICE_TRIES = 100;
const SPLICE_WAIT_MICROSECONDS = 10_000;

/** The largest response, in a frame. */
const MAX_ANSWER_BYTES = 4 + MAX_COMMAND_BYTES + 4;

const scratch = Buffer.alloc(MAX_FRAMED_BYTES);

/**
 * Gives answers so that each is given once, whenever the worker is killed. The command is still in its socket. The answer
 * is written into a pipe, which is empty and takes it as a whole, and this is marked in the shared memory; then the
 * command is taken from the socket; then the kernel moves the answer from the pipe to the socket, page by page. So what is
 * in the pipe is exactly what the client does not have yet. Pipe and sockets outlive the worker: the supervisor has them too.
 */
export class AnswerPipe {
  constructor(
    private readonly memory: CheckpointMemory,
    private readonly pipe: { readonly read: number; readonly write: number },
  ) {}

  /**
   * The answer to the command of `commandLength` bytes at the head of socket `fd`.
   * @returns false where nobody is there to take it
   */
  deliver(
    keeper: Pick<CheckpointKeeper, 'takeAnswerNumber'>,
    to: { readonly fd: number; readonly connection: number },
    commandLength: number,
    response: Buffer,
  ): boolean {
    const number = keeper.takeAnswerNumber();
    this.memory.begin(number, to.connection, commandLength);
    barrier('before-pipe');
    if (writeNow(this.pipe.write, response) !== response.length) {
      throw new VtpmdError('internal', 'the answer pipe does not take an answer');
    }
    barrier('after-pipe');
    this.memory.piped(number);
    barrier('before-consume');
    receiveNow(to.fd, scratch.subarray(0, commandLength));
    barrier('after-consume');
    const isSent = this.#send(to.fd, response.length);
    barrier('after-send');
    return isSent;
  }

  /**
   * What a worker before this one left in the pipe is sent, where it was wholly there, and dropped where not: its command
   * is still in the socket then.
   */
  finish(fdOf: (connection: number) => number | undefined): void {
    const { begun, piped, connection, commandLength } = this.memory.mark();
    const fd = begun === piped ? fdOf(connection) : undefined;
    if (fd !== undefined && this.holds()) {
      takeMarked(fd, commandLength);
      this.#send(fd, Number.POSITIVE_INFINITY);
    }
    this.drain();
  }

  holds(): boolean {
    return pipeHolds(this.pipe.read);
  }

  /** Empties it. @returns the first bytes of what was in it */
  drain(): Buffer {
    return drainPipe(this.pipe.read);
  }

  /** @param most that is in the pipe */
  #send(fd: number, most: number): boolean {
    let left = most;
    for (let tries = 0; tries < SPLICE_TRIES; tries++) {
      const moved = spliceNow(this.pipe.read, fd, MAX_ANSWER_BYTES);
      left -= Math.max(moved, 0);
      // Only behind a page is there more, and only of a worker before this one is it unknown how much.
      if (left <= 0 || (moved > 0 && !this.holds())) return true;
      if (moved > 0) continue;
      if (moved === 0 || hasHungUp(fd)) break;
      waitWritable(fd, SPLICE_WAIT_MICROSECONDS);
    }
    this.drain();
    return false;
  }
}

/**
 * Takes a command whose answer is in the pipe, unless the worker before did. The peek offset says so: it stands behind the
 * command while that is there and goes back to 0 with it.
 */
export function takeMarked(fd: number, commandLength: number): void {
  if (peekOffset(fd) > 0) receiveNow(fd, scratch.subarray(0, commandLength));
}
