import { barrier } from 'vtpm-common/barrier';
import { MAX_FRAMED_BYTES } from '../channels/framing.js';
import {
  drainPipe,
  hasHungUp,
  peekOffset,
  pipeHolds,
  receiveNow,
  setNonBlocking,
  spliceNow,
  waitWritable,
  writeNow,
} from '../channels/socket-io.js';
import { VtpmdError } from '../error.js';
import type { PipeMarks } from './memory.js';

/** Gives each answer a number; they rise over the whole VM run. */
export interface AnswerNumbers {
  takeAnswerNumber(): number;
}

/** Nobody but a client that does not read for so long makes an answer wait. */
const SPLICE_TRIES = 100;
const SPLICE_WAIT_MICROSECONDS = 10_000;

/** More than a pipe has room for. */
const MOST_PIPE_BYTES = 1024 * 1024;

const scratch = Buffer.alloc(MAX_FRAMED_BYTES);

/**
 * Gives answers so that each is given once, whenever the worker is killed. The command is still in its socket. The answer
 * is written into a pipe, which takes it as a whole (the TPM's are two pages at most), and this is marked in the shared
 * memory; then the command is taken from the socket; then the kernel moves the answer from the pipe to the socket. So what is
 * in the pipe is what the client does not have. Pipe and sockets outlive the worker: the supervisor has them too.
 */
export class AnswerPipe {
  constructor(
    private readonly marks: PipeMarks,
    private readonly pipe: { readonly read: number; readonly write: number },
  ) {}

  /**
   * The answer to the command of `commandLength` bytes at the head of socket `fd`.
   * @returns false where nobody is there to take it
   */
  deliver(
    numbers: AnswerNumbers,
    to: { readonly fd: number; readonly connection: number },
    commandLength: number,
    response: Buffer,
  ): boolean {
    const number = numbers.takeAnswerNumber();
    this.marks.begin(number, to.connection, commandLength);
    barrier('before-pipe');
    if (writeNow(this.pipe.write, response) !== response.length) {
      this.drain();
      throw new VtpmdError('internal', 'the answer pipe does not take an answer');
    }
    barrier('after-pipe');
    this.marks.piped(number);
    barrier('before-consume');
    takeBytes(to.fd, commandLength);
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
    const { begun, piped, connection, commandLength } = this.marks.mark();
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

  /** What does not fit at once stays in the pipe, so that it is known what is missing. */
  #send(fd: number, length = Number.POSITIVE_INFINITY): boolean {
    let left = length;
    for (let tries = 0; tries < SPLICE_TRIES; tries++) {
      // Whoever passed this end may have it too, and splice(2) does wait for a socket that blocks.
      setNonBlocking(fd);
      const moved = spliceNow(this.pipe.read, fd, MOST_PIPE_BYTES);
      if (moved > 0) {
        left -= moved;
        if (left <= 0 || !this.holds()) return true;
        tries = 0;
      } else if (moved === 0 || hasHungUp(fd)) {
        break;
      } else {
        waitWritable(fd, SPLICE_WAIT_MICROSECONDS);
      }
    }
    this.drain();
    return false;
  }
}

/** Takes so many bytes from the socket; with less where there are less. A receive ends where a descriptor was sent along. */
function takeBytes(fd: number, count: number): void {
  for (let left = count; left > 0; ) {
    const taken = receiveNow(fd, scratch.subarray(0, Math.min(left, scratch.length)));
    if (taken <= 0) return;
    left -= taken;
  }
}

/**
 * Takes a command whose answer is in the pipe, unless the worker before did. The peek offset says so: it stands behind the
 * command while that is there and goes back to 0 with it.
 */
export function takeMarked(fd: number, commandLength: number): void {
  takeBytes(fd, Math.min(peekOffset(fd), commandLength));
}
