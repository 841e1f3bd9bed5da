import { anchorCount } from '../support/filled-store.js';
import { ManagerInstallation, StandInTpm } from '../support/manager-process.js';
import { testVtpm } from '../support/worker-client.js';
import { type RowContext, row, type Suite } from './row.js';

const NAME = 'Anchor operations per 10,000 Saves';
const STREAMS = 20;
const SAVES = 500;

/** How often the chip counts, whose memory wears out by it. */
export const anchorSuite: Suite = {
  names: [NAME],
  async run({ report }: RowContext): Promise<void> {
    const chip = new StandInTpm();
    await chip.start();
    const manager = new ManagerInstallation();
    try {
      const managerId = String((await manager.init(`unix:${chip.socket}`)).managerId);
      await manager.start();
      const digest = manager.toolstack.imageDigest.toString('hex');
      await manager.admin('POST', '/images', { digest, note: 'benchmark' });
      await manager.stop();
      const before = await anchorCount(manager, chip.socket);
      await manager.start();
      const begin = performance.now();
      await Promise.all(Array.from({ length: STREAMS }, () => savesOf(manager, managerId)));
      const seconds = (performance.now() - begin) / 1000;
      await manager.stop();
      const steps = Number((await anchorCount(manager, chip.socket)) - before);
      const note = `${STREAMS * SAVES} Saves in ${seconds.toFixed(0)} s by ${STREAMS} vTPMs, Loads and the orderly stop included`;
      report(row(NAME, 'steps', { p50: steps, p99: steps }, null, note));
    } finally {
      await manager.remove();
      await chip.stop();
    }
  },
};

async function savesOf(manager: ManagerInstallation, managerId: string): Promise<void> {
  const worker = manager.worker(managerId);
  const vtpm = testVtpm();
  const ticket = manager.toolstack.ticket(worker.managerId, vtpm, worker.keys.publicKey);
  const session = await worker.session(vtpm, await worker.load(ticket));
  const permanent = Buffer.alloc(10 * 1024, 1);
  for (let save = 0; save < SAVES; save++) await session.save({ permanent });
  worker.close();
}
