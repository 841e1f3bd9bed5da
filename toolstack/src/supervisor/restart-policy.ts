import { ToolstackError, type ToolstackErrorCode } from '../error.js';
import type { Entry } from './entry.js';
import type { WorkerEnd } from './worker-process.js';

/** What a worker says when it ends because it may not go on, or because nobody could in its place. */
const FINAL: ReadonlySet<string> = new Set(['fenced', 'refused']);

/** Failures of a restart that pass. */
const PASSING: ReadonlySet<ToolstackErrorCode> = new Set(['manager-unreachable', 'locked']);
export const PASSING_RETRY_MS = 200;

/** No other worker goes on. What a worker in a VM of its own had cannot be passed on. */
export function isFinal(isolation: Entry['isolation'], { failure }: WorkerEnd): boolean {
  return isolation === 'vm' || FINAL.has(failure?.reason ?? '');
}

/** Tried again without end, and without counting. */
export function isPassing({ code }: ToolstackError): boolean {
  return PASSING.has(code);
}

/** Another try gives the same: what the manager or the delegation refuses, and a state that cannot go on. */
export function isHopeless({ code, message }: ToolstackError): boolean {
  const isRefused = code === 'bad-request' || code === 'manager-refused' || code === 'image-not-allowed';
  return isRefused || /^(no-checkpoint|verb-missing|wrong-vm|retired)\b/.test(message);
}

/** The copy that it was started from was touched since: a fresh one is of what is measured now. */
export function isOutdated(error: unknown): boolean {
  return error instanceof ToolstackError && error.code === 'image-changed';
}

/** What ended it has to do with the worker or its link, and nothing with the vTPM. */
export function wasLost({ failure, lingering }: WorkerEnd): boolean {
  return lingering.length === 0 && (failure === undefined || failure.reason === 'link-lost');
}
