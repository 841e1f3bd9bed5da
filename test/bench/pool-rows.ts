import { setImmediate } from 'node:timers/promises';
import { Installation, run } from '../support/installation.js';
import { type Swtpm, startSwtpm } from '../support/swtpm.js';
import { getRandom } from '../support/tpm-commands.js';
import { BlockingClient } from './blocking-client.js';
import { OwnStarts } from './own-starts.js';
import { cpuMilliseconds, family } from './process-figures.js';
import { type RowContext, row, type Suite } from './row.js';
import { interleaved, median, percentile } from './statistics.js';

const NEW = 'Start from the pool, new vTPM';
const OLD = 'Start from the pool, existing vTPM';
const CPU_SUPERVISOR = 'CPU of a start: supervisor';
const CPU_MANAGER = 'CPU of a start: manager and store';
const CPU_WORKER = 'CPU of a start: worker';
const CPU_AHEAD = 'CPU of a worker made ahead';
const BURST = 'New vTPMs, burst of 40';
const SUSTAINED = 'New vTPMs, sustained';
const POOL = 8;
const BURST_SIZE = 40;
/** Side by side. */
const LANES = 4;

/** Starts that find a worker waiting. */
export const poolSuite: Suite = {
  names: [NEW, OLD, CPU_SUPERVISOR, CPU_MANAGER, CPU_WORKER, CPU_AHEAD, BURST, SUSTAINED],
  async run(context: RowContext): Promise<void> {
    const { wanted } = context;
    if ([NEW, OLD, CPU_SUPERVISOR, CPU_MANAGER, CPU_WORKER, CPU_AHEAD].some(wanted)) {
      await withPool(POOL, (installation, starts) => single(context, installation, starts));
    }
    if (wanted(BURST)) await withPool(BURST_SIZE, (_, starts) => burst(context, starts));
    if (wanted(SUSTAINED)) await withPool(POOL, (_, starts) => sustained(context, starts));
  },
};

async function withPool(
  size: number,
  body: (installation: Installation, starts: OwnStarts) => Promise<void>,
): Promise<void> {
  const installation = await Installation.create();
  try {
    await installation.startManager();
    await installation.startSupervisor({
      env: { VTPM_POOL_MIN: String(size), VTPM_POOL_MAX: String(size) },
    });
    const starts = new OwnStarts(installation);
    // Nobody is interested in the first one.
    const name = await starts.register(starts.newName());
    starts.start(name);
    starts.stop(name);
    await starts.poolIsFull();
    await body(installation, starts);
  } finally {
    await installation.destroy();
  }
}

async function single(
  { effort, report }: RowContext,
  installation: Installation,
  starts: OwnStarts,
): Promise<void> {
  const swtpm = await startSwtpm();
  try {
    const cpu = new StartCpu(installation);
    const names: string[] = [];
    for (let left = POOL; left > 0; left--) names.push(await starts.register(starts.newName()));
    /** As many as the pool holds, one after the other. */
    const round = (chosen: readonly string[]): number[] =>
      chosen.map((name) => {
        const took = cpu.around(() => starts.start(name));
        starts.stop(name);
        return took;
      });
    const fresh = async (): Promise<number[]> => {
      const made: string[] = [];
      for (let left = POOL; left > 0; left--) made.push(await starts.register(starts.newName()));
      const times = round(made);
      for (const name of made) starts.forget(name);
      await cpu.aroundFilling(POOL, () => starts.poolIsFull());
      return times;
    };
    const existing = async (): Promise<number[]> => {
      const times = round(names);
      await starts.poolIsFull();
      return times;
    };
    round(names);
    await starts.poolIsFull();
    const [newTimes, oldTimes, prepared, alone] = await interleaved(effort.starts, [
      fresh,
      existing,
      async () => [await prepareAndStart(swtpm)],
      async () => [await startAlone(swtpm)],
    ]);
    const setUp = 'swtpm_setup --create-ek-cert, swtpm';
    report(row(NEW, 'ms', newTimes!, { name: setUp, ...prepared! }, 'request to first answer'));
    report(row(OLD, 'ms', oldTimes!, { name: 'swtpm', ...alone! }, 'request to first answer'));
    const note = 'new and existing vTPMs';
    report(row(CPU_SUPERVISOR, 'ms', spread(cpu.supervisor), null, note));
    report(row(CPU_MANAGER, 'ms', spread(cpu.manager), null, note));
    report(row(CPU_WORKER, 'ms', spread(cpu.worker), null, `${note}; after its rehearsal`));
    report(
      row(CPU_AHEAD, 'ms', spread(cpu.ahead), null, 'sandbox, node, rehearsal, supervisor; not waited for'),
    );
  } finally {
    await swtpm.stop();
  }
}

async function burst({ effort, report }: RowContext, starts: OwnStarts): Promise<void> {
  const rates: number[] = [];
  for (let left = Math.ceil(effort.rounds / 3); left > 0; left--) {
    const names: string[] = [];
    for (let made = 0; made < BURST_SIZE; made++) names.push(await starts.register(starts.newName()));
    const begin = performance.now();
    const calls = names.map((name) => ({ name, client: starts.begin('POST', `/vtpms/${name}/start`) }));
    const stops = calls.map(({ name, client }) => {
      client.answered();
      client.close();
      starts.use(name);
      return starts.begin('POST', `/vtpms/${name}/stop`);
    });
    for (const client of stops) {
      client.answered();
      client.close();
    }
    rates.push((1000 * BURST_SIZE) / (performance.now() - begin));
    for (const name of names) starts.forget(name);
    await starts.poolIsFull();
  }
  const note = 'asked for at once, a pool of 40: manufacture, first Save, one command, stop';
  report(
    row(BURST, '/s', { p50: median(rates), p99: Math.min(...rates) }, null, `${note}; p99: the slowest`),
  );
}

async function sustained({ effort, report }: RowContext, starts: OwnStarts): Promise<void> {
  const until = performance.now() + 3000 * effort.windowSeconds;
  const begin = performance.now();
  let made = 0;
  while (performance.now() < until) {
    // The daemons' log lines come through this process.
    await setImmediate();
    const names: string[] = [];
    for (let lane = 0; lane < LANES; lane++) names.push(await starts.register(starts.newName()));
    const calls = names.map((name) => starts.begin('POST', `/vtpms/${name}/start`));
    names.forEach((name, lane) => {
      calls[lane]!.answered();
      calls[lane]!.close();
      starts.use(name);
    });
    const stops = names.map((name) => starts.begin('POST', `/vtpms/${name}/stop`));
    for (const client of stops) {
      client.answered();
      client.close();
    }
    for (const name of names) starts.forget(name);
    made += LANES;
  }
  const seconds = (performance.now() - begin) / 1000;
  const rate = made / seconds;
  const note = `${made} in ${seconds.toFixed(0)} s, ${LANES} at a time: registered, manufactured, one command, stopped, forgotten`;
  report(row(SUSTAINED, '/s', { p50: rate, p99: rate }, null, note));
}

/** What each process uses of the processors for a start. */
class StartCpu {
  readonly supervisor: number[] = [];
  readonly manager: number[] = [];
  readonly worker: number[] = [];
  readonly ahead: number[] = [];

  constructor(private readonly installation: Installation) {}

  around(start: () => number): number {
    const { supervisor, manager } = this.installation;
    const [above, beside] = [supervisor?.pid ?? 0, family(manager?.pid ?? 0)];
    const workers = family(above).slice(1);
    const before = [cpuMilliseconds(above), total(beside), total(workers)] as const;
    const took = start();
    this.supervisor.push(cpuMilliseconds(above) - before[0]);
    this.manager.push(total(beside) - before[1]);
    this.worker.push(total(workers) - before[2]);
    return took;
  }

  async aroundFilling(count: number, fill: () => Promise<void>): Promise<void> {
    const supervisor = this.installation.supervisor?.pid ?? 0;
    const before = cpuMilliseconds(supervisor);
    await fill();
    // All that is there was made anew.
    const workers = total(family(supervisor).slice(1));
    this.ahead.push((workers + cpuMilliseconds(supervisor) - before) / count);
  }
}

function total(pids: readonly number[]): number {
  return pids.reduce((sum, pid) => sum + cpuMilliseconds(pid), 0);
}

function spread(values: readonly number[]): { p50: number; p99: number } {
  return { p50: median(values), p99: percentile(values, 0.99) };
}

async function startAlone(swtpm: Swtpm): Promise<number> {
  await swtpm.kill();
  return await timed(swtpm, () => swtpm.restart());
}

async function prepareAndStart(swtpm: Swtpm): Promise<number> {
  await swtpm.kill();
  return await timed(swtpm, async () => {
    const args = ['--tpm2', '--tpmstate', swtpm.directory, '--create-ek-cert', '--overwrite'];
    const { code, stdout, stderr } = await run('swtpm_setup', args);
    if (code !== 0) throw new Error(`swtpm_setup: ${stdout}${stderr}`);
    await swtpm.restart();
  });
}

async function timed(swtpm: Swtpm, start: () => Promise<void>): Promise<number> {
  const begin = performance.now();
  await start();
  const client = new BlockingClient(swtpm.socket);
  try {
    client.succeed(getRandom());
    return performance.now() - begin;
  } finally {
    client.close();
  }
}
