import { setTimeout as delay } from 'node:timers/promises';

/**
 * Asks again until there is an answer other than undefined or false. The limit only ends a test that hangs; no test
 * depends on how fast the answer comes.
 */
export async function until<T>(
  what: string,
  ask: () => Promise<T | undefined | false> | T | undefined | false,
  limitMs = 30_000,
): Promise<T> {
  const deadline = Date.now() + limitMs;
  for (;;) {
    const answer = await ask();
    if (answer !== undefined && answer !== false) return answer as T;
    if (Date.now() > deadline) throw new Error(`${what}: not within ${limitMs} ms`);
    await delay(10);
  }
}
