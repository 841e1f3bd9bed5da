import { setTimeout as delay } from 'node:timers/promises';

/** @param limitMs milliseconds @returns whether it is done by then @throws what it rejects with by then */
export async function isWithin(done: Promise<unknown>, limitMs: number): Promise<boolean> {
  const timeout = new AbortController();
  const isLate = delay(limitMs, false, { signal: timeout.signal }).catch(() => false);
  const isDone = await Promise.race([done.then(() => true), isLate]);
  timeout.abort();
  return isDone;
}
