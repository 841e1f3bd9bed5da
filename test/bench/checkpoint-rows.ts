import { Installation } from '../support/installation.js';
import { until } from '../support/until.js';
import { BlockingClient } from './blocking-client.js';
import { pin } from './process-figures.js';
import { type RowContext, row, type Suite } from './row.js';
import { interleaved, percentile } from './statistics.js';
import { COMMANDS, type Measured, NV_INCREMENT } from './tpm-bytes.js';

const PACE_MS = 3;
const PACED_COUNT = 60;
const CLIENT_CPU = 0;
const TPM_CPU = 1;
const MEASURED = [
  ...COMMANDS.filter(({ name }) => /GetRandom|PCR_Extend|ECDSA P-256 sign/.test(name)),
  NV_INCREMENT,
];
const KILL = 'kill -9 of a worker';

interface PriceRow {
  readonly name: string;
  readonly measured: Measured;
  readonly count: number;
  readonly paceMs: number;
}

const ROWS: readonly PriceRow[] = MEASURED.flatMap((measured) => [
  { name: `${measured.name}, checkpoint`, measured, count: measured.count, paceMs: 0 },
  { name: `${measured.name}, checkpoint, paced`, measured, count: PACED_COUNT, paceMs: PACE_MS },
]);

/** What it costs that a worker may be killed at any time, and what a guest sees of it. */
export const checkpointSuite: Suite = {
  names: [...ROWS.map(({ name }) => name), KILL],
  async run(context: RowContext): Promise<void> {
    const on = await Installation.create();
    const off = await Installation.create();
    try {
      await on.startManager();
      await on.startSupervisor({
        args: ['--pool-min', '2', '--pool-max', '4', '--restart-burst', '1000000'],
      });
      await off.startManager();
      await off.startSupervisor({ args: ['--checkpoint', 'off'] });
      for (const measured of MEASURED) {
        const rows = ROWS.filter((one) => one.measured === measured && context.wanted(one.name));
        if (rows.length > 0) await price(context, [on, off], measured, rows);
      }
      if (context.wanted(KILL)) await kills(context, on);
    } finally {
      pin(process.pid, undefined);
      await on.destroy();
      await off.destroy();
    }
  },
};

async function price(
  context: RowContext,
  installations: readonly Installation[],
  measured: Measured,
  rows: readonly PriceRow[],
): Promise<void> {
  pin(process.pid, undefined);
  const name = `bench-${MEASURED.indexOf(measured) + 1}`;
  const sides: { client: BlockingClient; bytes: Buffer }[] = [];
  for (const installation of installations) {
    const client = new BlockingClient(await installation.vtpm(name));
    pin(await installation.workerPid(name), TPM_CPU);
    sides.push({ client, bytes: measured.prepare(client) });
  }
  pin(process.pid, CLIENT_CPU);
  for (const { name: rowName, count, paceMs } of rows) {
    for (const { client, bytes } of sides) client.measure(bytes, 2 * measured.count, 0);
    const [kept, taken] = await interleaved(
      context.effort.rounds,
      sides.map(
        ({ client, bytes }) =>
          () =>
            client.measure(bytes, count, paceMs).map((milliseconds) => 1000 * milliseconds),
      ),
    );
    context.report(row(rowName, 'us', kept!, { name: 'checkpoint off', ...taken! }));
  }
  for (const { client } of sides) client.close();
}

/** From the kill to the answer of a command that was sent right after it. */
async function kills(context: RowContext, installation: Installation): Promise<void> {
  pin(process.pid, undefined);
  const door = await installation.vtpm('bench-kill');
  const client = new BlockingClient(door);
  const bytes = COMMANDS.find(({ name }) => name === 'PCR_Read')!.prepare(client);
  const times: number[] = [];
  for (let left = 2 * context.effort.starts; left > 0; left--) {
    client.succeed(bytes);
    const pid = await installation.workerPid('bench-kill');
    const start = performance.now();
    process.kill(pid, 'SIGKILL');
    client.succeed(bytes);
    times.push(performance.now() - start);
    await until('the vTPM runs, and a worker waits for the next kill', async () => {
      const { body } = await installation.supervisord('GET', '/vtpms/bench-kill');
      const { pool } = (await installation.supervisord('GET', '/health')).body;
      return body.state === 'running' && (pool as { idle: number }).idle > 0;
    });
  }
  client.close();
  const spread = { p50: percentile(times, 0.5), p99: percentile(times, 0.99) };
  context.report(
    row(KILL, 'ms', spread, null, 'until the next command is answered; a guest sees nothing else'),
  );
}
