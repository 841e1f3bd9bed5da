import type { CommandQueue, CommandSource } from './command-queue.js';

/**
 * Runs a command of the worker's own, before everything that waits. Resolves with a copy of the answer, once its effect
 * is durable. With `thenHold` no other command runs after it.
 */
export function runOwnCommand(queue: CommandQueue, command: Buffer, thenHold?: string): Promise<Buffer> {
  return new Promise((resolve) => {
    const source: CommandSource = {
      command,
      isGone: false,
      answer: (response) => {
        if (thenHold !== undefined) queue.hold(thenHold);
        resolve(Buffer.from(response));
      },
      dropped: () => {},
    };
    queue.submitFirst(source);
  });
}
