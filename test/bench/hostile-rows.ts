import { type ChildProcess, fork } from 'node:child_process';
import { once } from 'node:events';
import { setPriority } from 'node:os';
import { setTimeout as delay } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import { boxKeyPair, encode } from 'vtpm-proto';
import { cleanEnvironment } from '../support/installation.js';
import { ManagerInstallation, StandInTpm } from '../support/manager-process.js';
import { type TestSession, testVtpm } from '../support/worker-client.js';
import type { HostileOrder, Hostility } from './hostile-client.js';
import { type RowContext, row, type Suite } from './row.js';
import { interleaved } from './statistics.js';

const CLIENT = fileURLToPath(new URL('./hostile-client.js', import.meta.url));
const KINDS: readonly Hostility[] = [
  'floods with small Saves',
  'floods with the largest Saves',
  'does not read',
  'calls nonsense',
];
const nameOf = (kind: Hostility): string => `Save latency, a neighbour ${kind}`;
const STATE = Buffer.alloc(10 * 1024, 1);
/** Of a round of each side: a guest that saves now and then. */
const SAVES = 60;
const PAUSE_MS = 3;

/** What a worker that keeps to the rules notices of one that does not. The peer of each row is the same without it. */
export const hostileSuite: Suite = {
  names: KINDS.map(nameOf),
  async run({ effort, wanted, report }: RowContext): Promise<void> {
    const chip = new StandInTpm();
    await chip.start();
    const manager = new ManagerInstallation();
    try {
      const managerId = String((await manager.init(`unix:${chip.socket}`)).managerId);
      await manager.start();
      const digest = manager.toolstack.imageDigest.toString('hex');
      await manager.admin('POST', '/images', { digest, note: 'benchmark' });
      const victim = await victimOf(manager, managerId);
      for (const kind of KINDS) {
        if (!wanted(nameOf(kind))) continue;
        const hostile = await start(manager, managerId, kind);
        const quiet = (): Promise<number[]> => latencies(victim);
        const disturbed = async (): Promise<number[]> => {
          hostile.send('go');
          // Until it is under way.
          await delay(200);
          const took = await latencies(victim);
          hostile.send('rest');
          await delay(200);
          return took;
        };
        const [without, withIt] = await interleaved(effort.rounds, [quiet, disturbed]);
        hostile.kill('SIGKILL');
        const note = `10 KiB, ${PAUSE_MS} ms apart; the neighbour's own process has the lowest priority`;
        report(row(nameOf(kind), 'ms', withIt!, { name: 'without it', ...without! }, note));
      }
    } finally {
      await manager.remove();
      await chip.stop();
    }
  },
};

async function latencies(victim: TestSession): Promise<number[]> {
  const took: number[] = [];
  for (let save = 0; save < SAVES; save++) {
    await delay(PAUSE_MS);
    const begin = performance.now();
    await victim.save({ permanent: STATE });
    took.push(performance.now() - begin);
  }
  return took;
}

async function victimOf(manager: ManagerInstallation, managerId: string): Promise<TestSession> {
  const worker = manager.worker(managerId);
  const vtpm = testVtpm();
  const ticket = manager.toolstack.ticket(worker.managerId, vtpm, worker.keys.publicKey);
  return await worker.session(vtpm, await worker.load(ticket));
}

async function start(
  manager: ManagerInstallation,
  managerId: string,
  what: Hostility,
): Promise<ChildProcess> {
  const vtpm = testVtpm();
  const keys = boxKeyPair();
  const ticket = manager.toolstack.ticket(Buffer.from(managerId, 'hex'), vtpm, keys.publicKey);
  const order: HostileOrder = {
    what,
    socketPath: manager.paths.workerSocket,
    managerKey: managerId,
    secretKey: Buffer.from(keys.secretKey).toString('hex'),
    ticket: encode('SignedTicket', ticket).toString('base64'),
    vtpmId: vtpm.id,
    vtpmUuid: vtpm.uuid.toString('hex'),
  };
  const child = fork(CLIENT, { env: cleanEnvironment(), execArgv: [], stdio: 'inherit' });
  setPriority(child.pid ?? 0, 19);
  child.send(order);
  await once(child, 'message');
  return child;
}
