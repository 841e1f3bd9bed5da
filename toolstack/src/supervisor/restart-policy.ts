import { ToolstackError } from '../error.js';
import type { Entry } from './entry.js';
import type { WorkerEnd } from './worker-end.js';

/** What a worker says when it ends because it may not go on, or because nobody could in its place. */
const FINAL: ReadonlySet<string> = new Set(['fenced', 'refused']);

/** Milliseconds until the next try after what costs nothing to find out, after what cost a worker, and where an operator is asked. */
const RETRY_MS = 200;
const WORKER_RETRY_MS = 1_000;
const OPERATOR_RETRY_MS = 5_000;

/** What the manager, or the link to it, says where it is not the vTPM that is refused: as the worker passes it on. */
const PASSING = /^(rate-limited|busy|deadline|shutting-down|locked|store-full|link-lost|migrating): /;

/** No other worker goes on. What a worker in a VM of its own had cannot be passed on. */
export function isFinal(isolation: Entry['isolation'], { failure }: WorkerEnd): boolean {
  return isolation === 'vm' || FINAL.has(failure?.reason ?? '');
}

/**
 * A failure of a restart that passes is tried again without end, and without counting.
 * @returns milliseconds until then, undefined where it does not pass
 */
export function passingRetryMs({ code, message }: ToolstackError): number | undefined {
  if (code === 'manager-unreachable' || code === 'locked' || code === 'busy') return RETRY_MS;
  if (code === 'image-not-allowed' || code === 'migrating') return OPERATOR_RETRY_MS;
  // The machine has too much to do: no vTPM can be the cause.
  if (code === 'worker-late') return WORKER_RETRY_MS;
  return code === 'worker-failed' && PASSING.test(message) ? WORKER_RETRY_MS : undefined;
}

/** Another try gives the same: what the manager or the delegation refuses, and a state that cannot go on. */
export function isHopeless({ code, message }: ToolstackError): boolean {
  const isRefused = code === 'bad-request' || code === 'manager-refused';
  return isRefused || /^(no-checkpoint|verb-missing|wrong-vm|retired)\b/.test(message);
}

/** The copy that it was started from was touched since: a fresh one is of what is measured now. */
export function isOutdated(error: unknown): boolean {
  return error instanceof ToolstackError && error.code === 'image-changed';
}

/** What the manager says to a ticket that presumed too much, and what it says better when it is asked. */
const PRESUMED = new Set(['stale-epoch', 'verb-missing', 'wrong-vm', 'retired', 'locked', 'shutting-down']);

/** Its ticket may have been wrong: nothing has happened, and the next one is signed when the manager was asked. */
export function presumedWrong({ failure, lingering }: WorkerEnd): boolean {
  return lingering.length === 0 && PRESUMED.has(failure?.reason ?? '');
}

/** What ended it has to do with the worker or its link, and nothing with the vTPM. */
export function wasLost({ failure, lingering }: WorkerEnd): boolean {
  return lingering.length === 0 && (failure === undefined || failure.reason === 'link-lost');
}
