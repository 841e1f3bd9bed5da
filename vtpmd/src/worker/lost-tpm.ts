import { closeSync } from 'node:fs';
import { TAKEN_FRAMED, type Visitor } from '../channels/doors.js';
import { framed, isFramedAnswer } from '../channels/framing.js';
import { sendNow } from '../channels/socket-io.js';
import { serveTctiControl } from '../channels/tcti-control.js';
import { TpmConnection } from '../channels/tpm-connection.js';
import { type AnswerPipe, takeMarked } from '../checkpoint/answer-pipe.js';
import type { CheckpointMemory } from '../checkpoint/memory.js';
import { errorResponse, TPM_RC_FAILURE } from '../engine/command.js';
import { VtpmdError } from '../error.js';
import { RingConnection } from '../ring/ring-connection.js';
import type { CommandSource } from './command-queue.js';

/**
 * In the place of a TPM whose volatile state is lost: every command on every connection, Startup included, is answered with
 * TPM_RC_FAILURE, and there is neither libtpms nor state here. A guest that can end its worker must not get fresh PCRs
 * from it; only a new run of its VM brings them.
 */
export class LostTpm {
  readonly #queue = {
    submit: (source: CommandSource): void => source.answer(errorResponse(TPM_RC_FAILURE)),
    cancel: (): boolean => false,
  };

  /** Connections that were open when the last worker ended. Some may wait for an answer that is lost too. */
  adopt(
    visitors: readonly Visitor[],
    left: { readonly memory: CheckpointMemory; readonly pipe: AnswerPipe },
    onClosed: (id: number) => void,
  ): void {
    const waiting = this.#waiting(visitors, left.memory, left.pipe.drain());
    left.memory.taken.fill(0);
    for (const { fd, answer } of waiting) sendNow(fd, answer);
    for (const visitor of visitors) this.open(visitor, () => onClosed(visitor.id));
  }

  open({ kind, id, fd }: Visitor, onClosed: () => void): void {
    try {
      switch (kind) {
        case 'tpm':
        case 'tcti':
        case 'vmm-data':
          new TpmConnection(fd, this.#queue, { onClosed });
          return;
        case 'tcti-ctrl':
          serveTctiControl(fd, { established: false, cancel: () => {} }, onClosed);
          return;
        case 'ring':
          // Whoever took what stands in its page is gone.
          new RingConnection(fd, { id, queue: this.#queue }, onClosed).start(true);
          return;
        default:
          throw new VtpmdError('protocol', `nobody serves the door "${kind}"`);
      }
    } catch {
      closeSync(fd);
      onClosed();
    }
  }

  /** Those whose command was taken from its socket, and has no answer. */
  #waiting(
    visitors: readonly Visitor[],
    memory: CheckpointMemory,
    undelivered: Buffer,
  ): readonly { readonly fd: number; readonly answer: Buffer }[] {
    const failure = errorResponse(TPM_RC_FAILURE);
    const { begun, piped, connection, commandLength } = memory.mark();
    if (undelivered.length > 0 && begun === piped) {
      const visitor = visitors.find(({ id }) => id === connection);
      if (!visitor) return [];
      const { fd } = visitor;
      takeMarked(fd, commandLength);
      return [{ fd, answer: isFramedAnswer(undelivered) ? framed(failure) : failure }];
    }
    const taken = new Set(memory.taken);
    return visitors.flatMap(({ id, fd }) => {
      if (taken.has(id)) return [{ fd, answer: failure }];
      return taken.has((id | TAKEN_FRAMED) >>> 0) ? [{ fd, answer: framed(failure) }] : [];
    });
  }
}
