import { hash } from 'node:crypto';
import type { Visitor } from '../channels/doors.js';
import { MAX_FRAMED_BYTES } from '../channels/framing.js';
import { peekNow, setPeekOffset } from '../channels/socket-io.js';
import { VtpmdError } from '../error.js';
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
  { memory, pipe }: { readonly memory: CheckpointMemory; readonly pipe: AnswerPipe },
): void {
  const find = (id: number): Visitor | undefined => visitors.find((visitor) => visitor.id === id);
  pipe.finish((connection) => find(connection)?.fd);
  const { answered } = unit;
  if (!answered || memory.mark().piped >= unit.sequence) return;
  const visitor = find(answered.connection);
  if (!visitor) return;
  const { fd } = visitor;
  setPeekOffset(fd, 0);
  const head = Buffer.alloc(MAX_FRAMED_BYTES);
  const length = Math.max(0, peekNow(fd, head));
  const command = head.subarray(0, Math.min(length, answered.commandLength));
  if (
    command.length !== answered.commandLength ||
    !hash('sha256', command, 'buffer').equals(answered.commandDigest)
  ) {
    // Its client may have gone: then nobody waits. Nothing else takes a command from there.
    if (length === 0) return;
    throw new VtpmdError('no-checkpoint', 'the command that was answered is not the one in the socket');
  }
  setPeekOffset(fd, command.length);
  pipe.deliver(
    { takeAnswerNumber: () => unit.sequence },
    { fd, connection: answered.connection },
    command.length,
    answered.response,
  );
}
