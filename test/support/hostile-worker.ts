import { randomBytes } from 'node:crypto';
import { setTimeout as delay, setImmediate as turn } from 'node:timers/promises';
import { LOAD_PATH } from 'vtpm-proto';
import type { TestSession, WorkerClient } from './worker-client.js';

/** What a save may have at most, where nothing is suspended: each part at its limit. */
export const LARGEST_SAVE = {
  permanent: randomBytes(256 * 1024),
  journal: { sequence: 1n, request: randomBytes(4096), response: randomBytes(60 * 1024) },
} as const;
export const SMALLEST_SAVE = { permanent: Buffer.from('P') } as const;

/** Saves without pause, several of them ahead of their acknowledgements. */
export async function flood(
  session: TestSession,
  body: Parameters<TestSession['saveFrame']>[1],
  signal: AbortSignal,
  ahead = 4,
): Promise<void> {
  const { stream } = session;
  if (!stream) throw new Error('no stream');
  for (let unanswered = 0; !signal.aborted; ) {
    for (; unanswered < ahead; unanswered++) {
      session.sequence += 1n;
      stream.send(session.saveFrame(session.sequence, body));
    }
    await session.ack();
    unanswered--;
  }
}

/** Saves without pause and never reads what comes back. @returns when nothing more is taken from it for a while */
export async function stall(
  session: TestSession,
  body: Parameters<TestSession['saveFrame']>[1],
  count: number,
): Promise<void> {
  session.stream?.pause();
  for (let sent = 0; sent < count; sent++) {
    session.sequence += 1n;
    session.stream?.send(session.saveFrame(session.sequence, body));
    await turn();
  }
}

/** Calls with nonsense, on one connection after the other. */
export async function badCalls(connect: () => WorkerClient, signal: AbortSignal): Promise<void> {
  while (!signal.aborted) {
    const client = connect();
    for (let call = 0; call < 40 && !signal.aborted; call++) {
      await client.call(LOAD_PATH, randomBytes(600)).catch(() => undefined);
    }
    client.close();
    await delay(0);
  }
}
