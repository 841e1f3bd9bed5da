import assert from 'node:assert/strict';
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import type { Transport } from 'tpm2-ts-bindings';
import { RingClient } from 'vtpm-frontend-driver';
import { ExactGuest } from './exact-guest.js';
import { buildFaultyWorker } from './faulty-worker.js';
import { Installation } from './installation.js';
import { until } from './until.js';

/** Where a worker that leaves checkpoints may be killed: every point at which something else is known outside of it. */
export const CHECKPOINT_BARRIERS = [
  'before-process',
  'after-process',
  'before-checkpoint',
  'half-checkpoint',
  'after-checkpoint',
  'after-ack',
  'before-pipe',
  'after-pipe',
  'before-consume',
  'after-consume',
  'after-send',
] as const;

/** The same of a ring, where an answer goes into the page. */
export const RING_BARRIERS = [
  'after-claim',
  ...CHECKPOINT_BARRIERS.slice(0, CHECKPOINT_BARRIERS.indexOf('before-pipe')),
  'before-ring-answer',
  'after-ring-answer',
  'before-finish',
  'after-finish',
  'before-notify',
] as const;

/**
 * Each life of the worker ends at a barrier of its choice, the so-many-th time it comes there; it says where in its log. A
 * life that comes to none of them that often goes on.
 */
export function endsAnywhere(barriers: readonly string[], longest: number): string {
  return `import { writeSync } from 'node:fs';
const barriers = ${JSON.stringify(barriers)};
const at = barriers[Math.floor(Math.random() * barriers.length)];
let left = 1 + Math.floor(Math.random() * ${longest});
globalThis[Symbol.for('vtpm.barrier')] = (name) => {
  if (name !== at || --left > 0) return;
  writeSync(2, 'killed at ' + name + '\\n');
  // Its filter takes kill(2) away and leaves abort().
  try { process.kill(process.pid, 'SIGKILL'); } catch { process.abort(); }
};`;
}

async function overRing(path: string): Promise<Transport> {
  const ring = await RingClient.connect(path);
  return { transmit: (command) => ring.transmit(command), close: () => ring.close() };
}

/** How often the workers of vTPM web1 ended at each barrier. */
export function endingsIn(installation: Installation): Map<string, number> {
  const endings = new Map<string, number>();
  for (const [, name = ''] of logOf(installation).matchAll(/killed at ([a-z-]+)/g)) {
    endings.set(name, (endings.get(name) ?? 0) + 1);
  }
  return endings;
}

function logOf(installation: Installation): string {
  return readFileSync(join(installation.paths.log, 'vtpm-web1.log'), 'utf8');
}

/** One vTPM whose workers end again and again under a guest that notices everything. */
export class CheckpointRig {
  readonly #directory: string;
  kills = 0;

  private constructor(
    readonly installation: Installation,
    readonly guest: ExactGuest,
    directory: string,
  ) {
    this.#directory = directory;
  }

  /** @param barriers where workers end by themselves; none: only this test ends them @param door that the guest uses */
  static async create(
    barriers: readonly string[] = [],
    longest = 40,
    door: 'tpm' | 'ring' = 'tpm',
  ): Promise<CheckpointRig> {
    const directory = mkdtempSync(join(tmpdir(), 'vtpm-faults-'));
    const installation = await Installation.create({ tpm: 'embedded' });
    await installation.startManager();
    const args =
      barriers.length === 0
        ? []
        : ['--worker-manifest', await buildFaultyWorker(directory, endsAnywhere(barriers, longest))];
    // Here a worker ends as often as a test likes.
    await installation.startSupervisor({ args: ['--restart-burst', '1000000', ...args] });
    // A life may end before it serves for the first time: that start failed, as it must.
    await installation.ctlJson('create', 'web1', '--doors', door);
    await until('the vTPM runs', async () => (await installation.ctl('start', 'web1')).code === 0);
    const path = installation.door('web1', door);
    const guest = await ExactGuest.connect(door === 'tpm' ? path : await overRing(path));
    return new CheckpointRig(installation, guest, directory);
  }

  /** How often workers ended at each barrier. */
  readonly endings = (): Map<string, number> => endingsIn(this.installation);

  /** The guest goes on while workers end, until `isEnough`. @throws what the guest noticed */
  async runUntil(isEnough: () => boolean, limitMs: number): Promise<void> {
    const running = this.guest.run();
    const noticed = running.then(
      () => new Error('the guest stopped by itself'),
      (error: unknown) => error,
    );
    try {
      const first = await Promise.race([until('enough workers ended', isEnough, limitMs), noticed]);
      if (first !== true) throw await this.#explained(first);
    } finally {
      this.guest.stop();
    }
    await running;
    await this.check();
  }

  /** kill -9 at any moment while the guest goes on. */
  async killAtRandom(count: number, longestMs: number): Promise<void> {
    const running = this.guest.run();
    let noticed: unknown;
    running.catch((error: unknown) => {
      noticed = error;
    });
    for (; this.kills < count && !noticed; this.kills++) {
      const { worker } = await until('a worker serves', async () => {
        const { body } = await this.installation.supervisord('GET', '/vtpms/web1');
        if (body.state === 'running') return body as { worker: { pid: number } };
        return noticed ? { worker: undefined } : undefined;
      });
      if (!worker) break;
      await delay(Math.random() * longestMs);
      process.kill(worker.pid, 'SIGKILL');
      const { pid } = worker;
      await until('it is known to be dead', async () => {
        const { body } = await this.installation.supervisord('GET', '/vtpms/web1');
        return (body.worker as { pid: number } | null)?.pid !== pid || noticed !== undefined;
      });
    }
    this.guest.stop();
    if (noticed) throw await this.#explained(noticed);
    await running;
    await this.check();
  }

  async check(): Promise<void> {
    await this.guest.round();
    await this.guest.checkLockout();
    const { body } = await this.installation.supervisord('GET', '/vtpms/web1');
    assert.ok(body.state === 'running' || body.state === 'restarting', String(body.reason));
  }

  async destroy(): Promise<void> {
    await this.guest.close().catch(() => undefined);
    await this.installation.destroy();
    rmSync(this.#directory, { recursive: true, force: true });
  }

  async #explained(noticed: unknown): Promise<Error> {
    const { body } = await this.installation.supervisord('GET', '/vtpms/web1');
    const context = `${body.state}: ${body.reason}\n${this.installation.logs().slice(-3000)}\n${logOf(this.installation).slice(-3000)}`;
    return new Error(`${(noticed as Error).stack}\n${context}`, { cause: noticed });
  }
}
