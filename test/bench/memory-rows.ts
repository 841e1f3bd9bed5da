import { liveInACrowd } from '../support/crowd.js';
import { Installation } from '../support/installation.js';
import { type Swtpm, startSwtpm } from '../support/swtpm.js';
import { getRandom, nvDefineCounter, nvIncrement, pcrExtend, pcrRead } from '../support/tpm-commands.js';
import { BlockingClient } from './blocking-client.js';
import { privateMiB } from './process-figures.js';
import { type RowContext, row, type Suite } from './row.js';

const IDLE = 'Private memory, idle';
const USED = 'Private memory, used';
const GROWTH = 'Private memory, growth';
const EACH = 'Memory of a worker among many';
const TOTAL = 'Memory of many workers';
const UP = 'Many workers up';
const INDEX = 0x01500021;
const SAVES = 500;
const COMMANDS = 10_000;
/** By then Node has compiled what runs often. */
const WARM = 2_000;

/** What each further worker costs: a second one runs, so that what workers share is not counted. */
export const memorySuite: Suite = {
  names: [IDLE, USED, GROWTH],
  async run({ report }: RowContext): Promise<void> {
    const swtpm = await startSwtpm();
    const second = await startSwtpm();
    const installation = await Installation.create();
    try {
      await installation.start();
      await installation.vtpm('neighbour');
      const door = await installation.vtpm('measured');
      const pid = await installation.workerPid('measured');
      const figures = (): [number, number] => [privateMiB(pid), privateMiB(pidOf(swtpm))];
      const add = (name: string, [ours, peer]: [number, number], note: string): void =>
        report(row(name, 'MiB', { p50: ours, p99: ours }, { name: 'swtpm', p50: peer, p99: peer }, note));
      const here = new BlockingClient(door);
      const there = new BlockingClient(swtpm.socket);
      for (const client of [here, there]) client.succeed(getRandom());
      add(IDLE, figures(), 'the worker process, one answer given; another worker runs');
      for (const client of [here, there]) {
        client.succeed(nvDefineCounter(INDEX));
        work(client, WARM);
      }
      const warm = figures();
      for (const client of [here, there]) work(client, COMMANDS - WARM);
      const used = figures();
      add(USED, used, `after ${COMMANDS} commands with ${SAVES} Saves`);
      const [ours, peer] = used.map((after, side) => after - (warm[side] ?? 0));
      add(GROWTH, [ours ?? 0, peer ?? 0], `from command ${WARM} to command ${COMMANDS}`);
      here.close();
      there.close();
    } finally {
      await installation.destroy();
      await second.stop();
      await swtpm.stop();
    }
  },
};

/** Many workers at once: what the host holds for each of them. */
export const crowdSuite: Suite = {
  names: [EACH, TOTAL, UP],
  async run({ effort: { crowd }, report }: RowContext): Promise<void> {
    const installation = await Installation.create();
    try {
      await installation.start();
      const { upMs, totalMiB, eachMiB } = await liveInACrowd(installation, crowd);
      const add = (name: string, unit: string, value: number, note: string): void =>
        report(row(name, unit, { p50: value, p99: value }, null, note));
      add(EACH, 'MiB', eachMiB, `private, page tables, sandbox processes; one of ${crowd}`);
      add(TOTAL, 'MiB', totalMiB, `${crowd} workers`);
      add(UP, 's', upMs / 1000, `${crowd} new vTPMs without a pool, four at a time, each has answered`);
    } finally {
      await installation.destroy();
    }
  },
};

function work(client: BlockingClient, commands: number): void {
  const digest = Buffer.alloc(32, 3);
  const each = COMMANDS / SAVES;
  for (let done = 0; done < commands; done += each) {
    client.succeed(nvIncrement(INDEX));
    for (let left = each - 1; left > 0; left--) {
      client.succeed(left % 3 === 0 ? pcrExtend(16, digest) : left % 3 === 1 ? pcrRead(16) : getRandom(32));
    }
  }
}

function pidOf(swtpm: Swtpm): number {
  return swtpm.process.pid ?? 0;
}
