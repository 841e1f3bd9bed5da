import { barrier } from 'vtpm-common/barrier';
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

const scratch = Buffer.alloc(MAX_COMMAND_BYTES);

/**
 * Gives answers so that each is given once, whenever the worker is killed. The command is still in its socket. The answer
 * is written into a pipe, which takes it as a whole (it is one page), and this is marked in the shared memory; then the
 * command is taken from the socket; then the kernel moves the answer from the pipe to the socket, as a whole again, because
 * it fits into one buffer of either. So the pipe is empty exactly if the client has the answer. Pipe and sockets outlive
 * the worker: the supervisor has them too.
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
    const isSent = this.#send(to.fd);
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
      this.#send(fd);
    }
    this.drain();
  }

  holds(): boolean {
    return pipeHolds(this.pipe.read);
  }

  drain(): void {
    drainPipe(this.pipe.read);
  }

  #send(fd: number): boolean {
    for (let tries = 0; tries < SPLICE_TRIES; tries++) {
      const moved = spliceNow(this.pipe.read, fd, MAX_COMMAND_BYTES);
      if (moved > 0) return true;
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
