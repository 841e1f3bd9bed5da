import { ToolstackError } from '../error.js';
import type { WorkerMessage } from './control-protocol.js';
import type { ProcessId } from './processes.js';

/** `failed` as a worker said it. */
export type WorkerFailure = Omit<Extract<WorkerMessage, { type: 'failed' }>, 'type'>;

export interface WorkerEnd {
  /** A sentence without a final period. */
  readonly reason: string;
  readonly failure: WorkerFailure | undefined;
  /** It said `stopped` and ended with status 0. */
  readonly clean: boolean;
  /** What was killed and is still there; empty in all but the worst case. */
  readonly lingering: readonly ProcessId[];
}

/** @param overTime milliseconds that it was given to stop, where it was killed after them */
export function reasonOf(
  status: string,
  failure: WorkerFailure | undefined,
  overTime: number | undefined,
): string {
  if (failure) return `${failure.reason}: ${sentenceOf(failure)}`;
  if (overTime !== undefined) return `it did not stop within ${overTime} ms and was killed`;
  return `the worker ended by itself (${status})`;
}

/** To whoever waited for the worker. */
export function failureOf(end: WorkerEnd, logPath: string): ToolstackError {
  const code = end.failure?.reason === 'image-not-allowed' ? 'image-not-allowed' : 'worker-failed';
  if (end.failure && code === 'image-not-allowed') return new ToolstackError(code, sentenceOf(end.failure));
  const hint = end.failure ? '' : `; look into ${logPath}`;
  return new ToolstackError(code, `${end.reason}${hint}`);
}

/** What the manager refuses comes as `reason: sentence` already. */
function sentenceOf({ reason, message }: WorkerFailure): string {
  return message.startsWith(`${reason}: `) ? message.slice(reason.length + 2) : message;
}
