import { setTimeout as delay } from 'node:timers/promises';
import { RingClient } from 'vtpm-frontend-driver';
import { Installation } from '../support/installation.js';
import { startSwtpm } from '../support/swtpm.js';
import { getRandom } from '../support/tpm-commands.js';
import { BlockingClient } from './blocking-client.js';
import { cpuMilliseconds, pin } from './process-figures.js';
import { type RowContext, row, type Suite } from './row.js';
import { interleaved } from './statistics.js';

const CLIENT_CPU = 0;
const TPM_CPU = 1;
const COUNT = 1500;
const PACED_COUNT = 60;
const PACE_MS = 3;
const IDLE_SECONDS = 5;
const IDLE = 'Idle CPU of a worker with a ring';

interface RingRow {
  readonly name: string;
  readonly waits: 'adaptive' | 'spinning';
  readonly checkpoint: 'off' | 'always';
  readonly count: number;
  readonly paceMs: number;
}

const ROWS: readonly RingRow[] = [
  { name: 'GetRandom, ring, spinning', waits: 'spinning', checkpoint: 'off', count: COUNT, paceMs: 0 },
  {
    name: 'GetRandom, ring, spinning, checkpoint',
    waits: 'spinning',
    checkpoint: 'always',
    count: COUNT,
    paceMs: 0,
  },
  { name: 'GetRandom, ring, adaptive', waits: 'adaptive', checkpoint: 'off', count: COUNT, paceMs: 0 },
  {
    name: 'GetRandom, ring, adaptive, paced',
    waits: 'adaptive',
    checkpoint: 'off',
    count: PACED_COUNT,
    paceMs: PACE_MS,
  },
];

/** Round trips through pages that are shared with a vTPM, beside swtpm's unix socket. A CPU for each, as in command-rows.ts. */
export const ringSuite: Suite = {
  names: [...ROWS.map(({ name }) => name), IDLE],
  async run(context: RowContext): Promise<void> {
    const swtpm = await startSwtpm();
    try {
      for (const checkpoint of ['off', 'always'] as const) {
        const rows = ROWS.filter((one) => one.checkpoint === checkpoint && context.wanted(one.name));
        const mustIdle = checkpoint === 'always' && context.wanted(IDLE);
        if (rows.length === 0 && !mustIdle) continue;
        const installation = await Installation.create();
        try {
          await installation.startManager();
          await installation.startSupervisor({ args: ['--checkpoint', checkpoint] });
          pin(process.pid, undefined);
          await installation.vtpm('bench', '--doors', 'ring');
          await swtpm.restart();
          const pid = await installation.workerPid('bench');
          pin(pid, TPM_CPU);
          pin(swtpm.process.pid ?? 0, TPM_CPU);
          pin(process.pid, CLIENT_CPU);
          const path = installation.door('bench', 'ring');
          for (const one of rows) await measureRow(context, one, path, swtpm.socket);
          if (mustIdle) await measureIdle(context, path, pid);
        } finally {
          pin(process.pid, undefined);
          await installation.destroy();
        }
      }
    } finally {
      await swtpm.stop();
    }
  },
};

async function measureRow(
  context: RowContext,
  { name, waits, count, paceMs }: RingRow,
  path: string,
  peerPath: string,
): Promise<void> {
  const here = await RingClient.connect({ path, waits });
  const there = new BlockingClient(peerPath);
  const bytes = getRandom(16);
  // Node compiles what runs often, and goes on doing so for some thousand commands.
  await times(here, bytes, 4 * COUNT, 0);
  there.measure(bytes, 2 * COUNT, 0);
  const [ours, peer] = await interleaved(context.effort.rounds, [
    async () => (await times(here, bytes, count, paceMs)).map(microseconds),
    () => there.measure(bytes, count, paceMs).map(microseconds),
  ]);
  const note = paceMs > 0 ? `one each ${paceMs} ms` : '';
  context.report(row(name, 'us', ours!, { name: 'swtpm, unix socket', ...peer! }, note));
  await here.close();
  there.close();
}

/** Milliseconds of `count` round trips, as BlockingClient measures them. */
async function times(client: RingClient, bytes: Buffer, count: number, paceMs: number): Promise<number[]> {
  const clock = new Int32Array(new SharedArrayBuffer(4));
  const out: number[] = [];
  await client.transmit(bytes);
  for (let left = count; left > 0; left--) {
    if (paceMs > 0) Atomics.wait(clock, 0, 0, paceMs);
    const start = process.hrtime.bigint();
    const response = await client.transmit(bytes);
    out.push(Number(process.hrtime.bigint() - start) / 1e6);
    if (response.readUInt32BE(6) !== 0) throw new Error('a measured command failed');
  }
  return out;
}

/** Nothing comes: what a ring costs that is only open. */
async function measureIdle(context: RowContext, path: string, pid: number): Promise<void> {
  const client = await RingClient.connect(path);
  await client.transmit(getRandom());
  await delay(1000);
  const before = cpuMilliseconds(pid);
  await delay(IDLE_SECONDS * 1000);
  const each = (cpuMilliseconds(pid) - before) / IDLE_SECONDS;
  context.report(
    row(IDLE, 'ms/s', { p50: each, p99: each }, null, 'adaptive, the ring is open and nothing comes'),
  );
  await client.close();
}

function microseconds(milliseconds: number): number {
  return milliseconds * 1000;
}
