import { hash } from 'node:crypto';
import type { Visitor } from '../channels/doors.js';
import { peekNow, setPeekOffset } from '../channels/socket-io.js';
import { VtpmdError } from '../error.js';
import { endRingAnswers } from '../ring/recover.js';
import type { AnswerPipe } from './answer-pipe.js';
import type { CheckpointMemory } from './memory.js';
import type { Unit } from './unit.js';

/**
 * Ends what the worker before was at: the answer in the pipe, or the one in the unit, is given, before the TPM does
 * anything. The numbers of answers go on in the unit's: one that went into the pipe as a whole went to its client, or goes
 * there now; a later one is given from the unit, where that has it, and else its command runs again.
 * @throws VtpmdError `no-checkpoint` where the command is not the one that the unit answers
 */
export function endWhatWasGoingOn(
  unit: Unit,
  visitors: readonly Visitor[],
  left: {
    readonly memory: CheckpointMemory;
    readonly pipe: AnswerPipe;
    readonly controlPipe: AnswerPipe | undefined;
  },
): void {
  endRingAnswers(unit, visitors, left.memory);
  const find = (id: number): Visitor | undefined => visitors.find((visitor) => visitor.id === id);
  const fdOf = (connection: number): number | undefined => find(connection)?.fd;
  left.pipe.finish(fdOf);
  left.controlPipe?.finish(fdOf);
  const { answered } = unit;
  const marks = answered?.isControl ? left.memory.controlMarks : left.memory.marks;
  if (!answered || marks.mark().piped >= unit.sequence) return;
  const visitor = find(answered.connection);
  const pipe = answered.isControl ? left.controlPipe : left.pipe;
  if (!visitor || !pipe || visitor.kind === 'ring') return;
  const { fd } = visitor;
  const command = peekHead(fd, answered.commandLength);
  if (
    command.length !== answered.commandLength ||
    !hash('sha256', command, 'buffer').equals(answered.commandDigest)
  ) {
    // Its client may have gone: then nobody waits. Nothing else takes a command from there.
    if (command.length === 0) return;
    throw new VtpmdError('no-checkpoint', 'the command that was answered is not the one in the socket');
  }
  pipe.deliver(
    { takeAnswerNumber: () => unit.sequence },
    { fd, connection: answered.connection },
    command.length,
    answered.response,
  );
}

/** The first bytes in the socket, at most so many. The peek offset is behind them then. */
function peekHead(fd: number, length: number): Buffer {
  const head = Buffer.alloc(length);
  setPeekOffset(fd, 0);
  let there = 0;
  // A look ends where a descriptor was sent along.
  for (let count = 1; count > 0 && there < length; there += count) {
    count = Math.max(0, peekNow(fd, head.subarray(there)));
  }
  return head.subarray(0, there);
}
