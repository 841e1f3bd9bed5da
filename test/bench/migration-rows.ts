import { once } from 'node:events';
import { copyFileSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { createConnection } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { FollowingDoor } from '../support/following-door.js';
import { migrate, type ToldProgress } from '../support/migrate.js';
import { type Swtpm, startSwtpm, startSwtpmForVmm } from '../support/swtpm.js';
import { TpmClient } from '../support/tpm-client.js';
import { getRandom } from '../support/tpm-commands.js';
import { type Host, TwoHosts } from '../support/two-hosts.js';
import { Vmm } from '../support/vmm.js';
import { BlockingClient } from './blocking-client.js';
import { OwnStarts } from './own-starts.js';
import { peakMiB } from './process-figures.js';
import { type RowContext, row, type Suite } from './row.js';
import { median, percentile, type Spread } from './statistics.js';

const DOWNTIME = 'Live migration, downtime';
const PHASES = 'Live migration, phase';
const TOTAL = 'Live migration, total';
const BYTES = 'Live migration, bytes';
const CHIP = 'Live migration, downtime with a slow chip';
const EVACUATION = 'Evacuation, wall time';
const EVACUATION_MEMORY = 'Evacuation, peak memory of a manager';

/** What a discrete TPM takes. */
const CHIP_MS = { quote: 160, increment: { least: 40, most: 100 } } as const;
/** Each end forces its anchor once between freeze and commit. */
const FORCED_ANCHORS = 2;
/** In the order in which they come; each begins where the one before ends. */
const DOWN = ['FREEZING', 'FROZEN', 'SENDING', 'DECIDING', 'COMMITTED'] as const;
const BEFORE = ['CONNECTING', 'ATTESTING', 'PREPARING', 'PREPARED'] as const;
/** Of an evacuation. */
const MOST_VTPMS = 100;

/** Two hosts with a software TPM each, in networks of their own; the state goes back and forth. */
export const migrationSuite: Suite = {
  names: [DOWNTIME, CHIP, TOTAL, BYTES, ...[...BEFORE, ...DOWN].map(phaseRow), EVACUATION, EVACUATION_MEMORY],
  async run(context: RowContext): Promise<void> {
    const hosts = await TwoHosts.create({ a: { hasPool: true }, b: { hasPool: true } });
    try {
      const { wanted } = context;
      if (migrationSuite.names.slice(0, -2).some(wanted)) await liveRows(hosts, context);
      if (wanted(EVACUATION) || wanted(EVACUATION_MEMORY)) await evacuationRows(hosts, context);
    } finally {
      await hosts.destroy();
    }
  },
};

function phaseRow(phase: string): string {
  return `${PHASES} ${phase.toLowerCase()}`;
}

async function liveRows(hosts: TwoHosts, { effort, report }: RowContext): Promise<void> {
  const name = 'bench';
  await hosts.a.installation.vtpm(name);
  const way = new FollowingDoor([hosts.a, hosts.b].map(({ installation }) => installation.door(name)));
  const moves: ToldProgress[][] = [];
  const [copied, handed]: [number[], number[]] = [[], []];
  const swtpms = [await startSwtpm(), await startSwtpm()] as const;
  let from: Host = hosts.a;
  const moveOnce = async (): Promise<void> => {
    let isMoving = true;
    const guest = (async () => {
      while (isMoving) await way.transmit(getRandom());
      await way.transmit(getRandom());
    })();
    const to = hosts.other(from);
    moves.push(await migrate(from, to, name));
    from = to;
    isMoving = false;
    await guest;
  };
  const rounds = 4 * effort.rounds;
  for (let move = 0; move < rounds; move++) {
    await moveOnce();
    copied.push(await copySwtpm(...swtpms));
    handed.push(await moveSwtpm());
  }
  await way.close();
  for (const swtpm of swtpms) await swtpm.stop();
  const gaps = spread(way.gaps.map(({ ms }) => ms));
  const note = `a guest's last answer there to its first one here, ${rounds} moves; handed from one waiting swtpm to another by a VMM: ${median(handed).toFixed(1)}`;
  report(row(DOWNTIME, 'ms', gaps, { name: 'swtpm: stop, copy, start', ...spread(copied) }, note));
  const added = (ms: number): Spread => ({ p50: gaps.p50 + ms, p99: gaps.p99 + ms });
  const { least, most } = CHIP_MS.increment;
  const [low, high] = [added(FORCED_ANCHORS * least), added(FORCED_ANCHORS * most)];
  report(
    row(
      CHIP,
      'ms',
      high,
      null,
      `computed: two forced anchors of ${most} ms each on top (of ${least} ms: ${low.p50.toFixed(0)}); two quotes of ${CHIP_MS.quote} ms and the import key come before the freeze`,
    ),
  );
  report(
    row(TOTAL, 'ms', spread(moves.map((lines) => last(lines).elapsedUs / 1000)), null, 'order to commit'),
  );
  report(
    row(BYTES, 'KiB', spread(moves.map((lines) => last(lines).bytesSent / 1024)), null, 'sent by the source'),
  );
  for (const phase of [...BEFORE, ...DOWN.slice(0, -1)]) {
    const values = moves.map((lines) => lasted(lines, phase));
    report(row(phaseRow(phase), 'ms', spread(values), null, 'as a toolstack hears it'));
  }
}

function last(lines: readonly ToldProgress[]): ToldProgress {
  const line = lines.at(-1);
  if (line?.phase !== 'COMMITTED') throw new Error(`not migrated: ${JSON.stringify(line)}`);
  return line;
}

/** By the managers' clock. */
function lasted(lines: readonly ToldProgress[], phase: string): number {
  const begin = lines.findIndex((line) => line.phase === phase);
  const next = lines.slice(begin).find((line) => line.phase !== phase);
  if (begin < 0 || !next) return 0;
  return (next.elapsedUs - (lines[begin] as ToldProgress).elapsedUs) / 1000;
}

/** Its state is a file: the process ends, the file is copied, another process starts. What is volatile is lost. */
async function copySwtpm(here: Swtpm, there: Swtpm): Promise<number> {
  await there.kill();
  await here.restart();
  new BlockingClient(here.socket).close();
  const begin = performance.now();
  await here.kill();
  copyFileSync(join(here.directory, STATE_FILE), join(there.directory, STATE_FILE));
  await there.restart();
  const client = new BlockingClient(there.socket);
  client.succeed(getRandom());
  client.close();
  return performance.now() - begin;
}

/** What a VMM does with two of swtpm, RAM and device model left out: the second process waits already. */
async function moveSwtpm(): Promise<number> {
  const directories = [0, 1].map(() => mkdtempSync(join(tmpdir(), 'vtpm-swtpm-')));
  const swtpms = [
    await startSwtpmForVmm(directories[0] as string),
    await startSwtpmForVmm(directories[1] as string),
  ];
  const [here, there] = await Promise.all(swtpms.map(({ control }) => vmmOf(control)));
  if (!here || !there) throw new Error('no VMM');
  try {
    await here.powerOn();
    await there.setDataFd();
    await here.data?.transmit(STARTUP);
    await here.data?.transmit(getRandom());
    const begin = performance.now();
    for (const type of BLOBS) {
      const blob = await here.getBlob(type);
      if (Buffer.isBuffer(blob)) await there.setBlob(type, blob);
    }
    await here.answer('STOP');
    await there.powerOn();
    await there.data?.transmit(getRandom());
    return performance.now() - begin;
  } finally {
    for (const vmm of [here, there]) vmm.close();
    for (const swtpm of swtpms) await swtpm.stop();
    for (const directory of directories) rmSync(directory, { recursive: true, force: true });
  }
}

const STATE_FILE = 'tpm2-00.permall';
/** PTM_BLOB_TYPE_PERMANENT, _VOLATILE and _SAVESTATE. */
const BLOBS = [1, 2, 3];
/** TPM2_Startup(CLEAR). */
const STARTUP = Buffer.from('80010000000c000001440000', 'hex');

async function vmmOf(control: string): Promise<Vmm> {
  const socket = createConnection(control);
  await once(socket, 'connect');
  return new Vmm(new TpmClient(socket));
}

async function evacuationRows({ a, b }: TwoHosts, { effort, report }: RowContext): Promise<void> {
  const count = Math.min(MOST_VTPMS, effort.crowd);
  const starts = new OwnStarts(a.installation);
  const names: string[] = [];
  for (let index = 0; index < count; index++) {
    const name = await starts.register(`away-${index}`);
    starts.start(name);
    names.push(name);
  }
  await new OwnStarts(b.installation).poolIsFull();
  const managers = [a, b].map(({ installation }) => installation.manager?.pid ?? 0);
  for (const pid of managers) forgetPeak(pid);
  const begin = performance.now();
  const { code, stderr } = await a.installation.ctl('evacuate', '--to', 'b', '--only', 'away-*');
  if (code !== 0) throw new Error(`vtpmctl evacuate: ${stderr}`);
  const took = (performance.now() - begin) / 1000;
  const peaks = managers.map(peakMiB);
  report(row(EVACUATION, 's', { p50: took, p99: took }, null, `${count} running vTPMs, by vtpmctl evacuate`));
  const most = Math.max(...peaks);
  const note = `resident; source ${peaks[0]?.toFixed(0)}, destination ${peaks[1]?.toFixed(0)}`;
  report(row(EVACUATION_MEMORY, 'MiB', { p50: most, p99: most }, null, note));
}

/** proc(5), clear_refs: 5 resets the peak resident size. */
function forgetPeak(pid: number): void {
  writeFileSync(`/proc/${pid}/clear_refs`, '5');
}

function spread(values: readonly number[]): Spread {
  return { p50: median(values), p99: percentile(values, 0.99) };
}
