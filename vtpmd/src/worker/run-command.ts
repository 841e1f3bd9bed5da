import { commandCode, errorResponse, isSlow } from '../engine/command.js';
import type { Processed, TpmEngine } from '../engine/engine.js';
import type { CommandSource } from './command-source.js';

/** How often a slow command looks whether somebody waits for it. */
const LEFT_CHECK_MS = 20;

/**
 * Runs the command of a source, or refuses it where the source says so. A slow one runs on another thread, and is cancelled
 * when nobody waits for its answer any more. @returns a promise where it is slow
 */
export function runCommand(engine: TpmEngine, source: CommandSource): Processed | Promise<Processed> {
  const { command, locality, refusal } = source;
  if (refusal !== undefined) return { response: errorResponse(refusal), stored: undefined };
  if (!isSlow(commandCode(command))) return engine.process(command, locality);
  // Its connection's memory may be another command's meanwhile.
  source.command = Buffer.from(command);
  const watch = setInterval(() => {
    if (source.isGone || source.hasLeft?.()) engine.cancel();
  }, LEFT_CHECK_MS);
  return engine.processAsync(source.command, locality).finally(() => clearInterval(watch));
}
