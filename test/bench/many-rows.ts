import { fillStore } from '../support/filled-store.js';
import { ManagerInstallation, StandInTpm } from '../support/manager-process.js';
import { cpuSeconds, family, peakMiB } from './process-figures.js';
import { type RowContext, row, type Suite } from './row.js';
import { median, percentile } from './statistics.js';

const VTPMS = 50_000;
const STATE_BYTES = 10 * 1024;
const STARTS = 3;
const START = 'Start with 50,000 vTPMs';
const CPU = 'CPU of a start with 50,000 vTPMs';
const MEMORY = 'Peak memory with 50,000 vTPMs';

/** The real manager on a store of many vTPMs: every record is read and hashed before anything is served from it. */
export const manySuite: Suite = {
  names: [START, CPU, MEMORY],
  async run({ report }: RowContext): Promise<void> {
    const chip = new StandInTpm();
    await chip.start();
    const manager = new ManagerInstallation();
    try {
      await manager.init(`unix:${chip.socket}`);
      await fillStore(manager, chip.socket, VTPMS, STATE_BYTES);
      const [took, cpu, memory]: number[][] = [[], [], []];
      for (let start = 0; start < STARTS; start++) {
        const begin = performance.now();
        const { vtpms } = await manager.start();
        took!.push(performance.now() - begin);
        if (vtpms !== VTPMS) throw new Error(`the manager has ${String(vtpms)} vTPMs`);
        const pid = manager.child?.pid ?? 0;
        cpu!.push(1000 * cpuSeconds(family(pid)));
        memory!.push(peakMiB(pid));
        await manager.stop();
      }
      const spread = (values: number[]) => ({ p50: median(values), p99: percentile(values, 0.99) });
      report(row(START, 'ms', spread(took!), null, '10 KiB states; process start to ready'));
      report(row(CPU, 'ms', spread(cpu!), null, 'manager and store process'));
      report(row(MEMORY, 'MiB', spread(memory!), null, 'resident, of the manager'));
    } finally {
      await manager.remove();
      await chip.stop();
    }
  },
};
