import { errorResponse, TPM_RC_FAILURE } from '../engine/command.js';
import type { CommandQueue } from './command-queue.js';

/**
 * Runs a command of the worker's own, before everything that waits. Resolves with a copy of the answer, once its effect
 * is durable. With `thenHold` no other command runs after it. A TPM that is powered off meanwhile gives TPM_RC_FAILURE.
 */
export function runOwnCommand(queue: CommandQueue, command: Buffer, thenHold?: string): Promise<Buffer> {
  return new Promise((resolve) => {
    const answer = (response: Buffer): void => {
      if (thenHold !== undefined) queue.hold(thenHold);
      resolve(Buffer.from(response));
    };
    const dropped = (): void => answer(errorResponse(TPM_RC_FAILURE));
    queue.submitFirst({ command, isGone: false, answer, dropped });
  });
}
