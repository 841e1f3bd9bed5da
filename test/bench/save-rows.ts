import { type ChildProcess, fork } from 'node:child_process';
import { once } from 'node:events';
import { setTimeout as delay } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import { boxKeyPair, encode } from 'vtpm-proto';
import { cleanEnvironment } from '../support/installation.js';
import { ManagerInstallation, StandInTpm } from '../support/manager-process.js';
import { testVtpm } from '../support/worker-client.js';
import { cpuSeconds, family } from './process-figures.js';
import { type RowContext, row, type Suite } from './row.js';
import type { Instruction, MeasuredSaves, SaveOrder, StreamIdentity } from './save-client.js';
import { median, percentile } from './statistics.js';

const CLIENT = fileURLToPath(new URL('./save-client.js', import.meta.url));
const STREAMS = [1, 16, 64, 256];
const STATE_BYTES = 10 * 1024;
const SLICE_MS = 500;

const rateName = (streams: number): string => `Saves a second, ${streams} stream${streams === 1 ? '' : 's'}`;
const latencyName = (streams: number): string => `Save latency, ${streams} stream${streams === 1 ? '' : 's'}`;
const cpuName = (streams: number): string => `CPU per Save, ${streams} stream${streams === 1 ? '' : 's'}`;

/** Durable Saves at the real manager and its store process, over the worker's own client in a process of its own. */
export const saveSuite: Suite = {
  names: STREAMS.flatMap((streams) => [rateName(streams), latencyName(streams), cpuName(streams)]),
  async run(context: RowContext): Promise<void> {
    const chip = new StandInTpm();
    await chip.start();
    const manager = new ManagerInstallation();
    try {
      const { managerId } = await manager.init(`unix:${chip.socket}`);
      await manager.start();
      const digest = manager.toolstack.imageDigest.toString('hex');
      await manager.admin('POST', '/images', { digest, note: 'benchmark' });
      for (const streams of STREAMS) {
        const names = [rateName(streams), latencyName(streams), cpuName(streams)];
        if (names.some(context.wanted)) await measure(context, manager, String(managerId), streams);
      }
    } finally {
      await manager.remove();
      await chip.stop();
    }
  },
};

async function measure(
  { effort, report }: RowContext,
  manager: ManagerInstallation,
  managerId: string,
  streams: number,
): Promise<void> {
  const order: SaveOrder = {
    socketPath: manager.paths.workerSocket,
    managerKey: managerId,
    stateBytes: STATE_BYTES,
    streams: Array.from({ length: streams }, () => identityOf(manager, managerId)),
  };
  const client = fork(CLIENT, { env: cleanEnvironment(), execArgv: [], stdio: 'inherit' });
  try {
    client.send(order);
    await messageFrom(client);
    instruct(client, 'go');
    await delay(effort.warmUpSeconds * 1000);
    const processes = family(manager.child?.pid ?? 0);
    instruct(client, 'mark');
    const cpuBefore = cpuSeconds(processes);
    await delay(effort.windowSeconds * 1000);
    const cpu = cpuSeconds(processes) - cpuBefore;
    const answer = messageFrom(client);
    instruct(client, 'report');
    const { at, took } = (await answer) as MeasuredSaves;
    const rates = slices(at, effort.windowSeconds * 1000);
    const note = `10 KiB states, durable; window ${effort.windowSeconds} s; p99: slowest half second`;
    report(row(rateName(streams), '1/s', { p50: median(rates), p99: Math.min(...rates) }, null, note));
    const latency = { p50: median(took), p99: percentile(took, 0.99) };
    report(row(latencyName(streams), 'ms', latency, null, 'seen by the worker'));
    const each = (1000 * cpu) / Math.max(1, at.length);
    report(row(cpuName(streams), 'ms', { p50: each, p99: each }, null, 'manager and store process; mean'));
  } finally {
    client.kill('SIGKILL');
  }
}

function identityOf(manager: ManagerInstallation, managerId: string): StreamIdentity {
  const vtpm = testVtpm();
  const keys = boxKeyPair();
  const ticket = manager.toolstack.ticket(Buffer.from(managerId, 'hex'), vtpm, keys.publicKey);
  return {
    secretKey: Buffer.from(keys.secretKey).toString('hex'),
    ticket: encode('SignedTicket', ticket).toString('base64'),
  };
}

function instruct(client: ChildProcess, instruction: Instruction): void {
  client.send(instruction);
}

async function messageFrom(client: ChildProcess): Promise<unknown> {
  const ended = once(client, 'exit').then(() => {
    throw new Error('the load client ended');
  });
  const [message] = (await Promise.race([once(client, 'message'), ended])) as [unknown];
  ended.catch(() => {});
  return message;
}

/** Saves a second in each slice of the window. */
function slices(at: readonly number[], windowMs: number): number[] {
  const counts = new Array<number>(Math.floor(windowMs / SLICE_MS)).fill(0);
  for (const time of at) {
    const slice = Math.floor(time / SLICE_MS);
    if (slice < counts.length) counts[slice] = counts[slice]! + 1;
  }
  return counts.map((count) => (count * 1000) / SLICE_MS);
}
