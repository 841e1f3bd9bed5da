import { Installation } from '../support/installation.js';
import { startSwtpm } from '../support/swtpm.js';
import { BlockingClient } from './blocking-client.js';
import { pin } from './process-figures.js';
import { type RowContext, row, type Suite } from './row.js';
import { interleaved } from './statistics.js';
import { COMMANDS, type Measured, NV_INCREMENT } from './tpm-bytes.js';

const PACE_MS = 3;
const CLIENT_CPU = 0;
const TPM_CPU = 1;
const PACED_COUNT = 60;
const WARM_UP_ROUNDS = 2;

interface CommandRow {
  readonly name: string;
  readonly measured: Measured;
  readonly count: number;
  readonly paceMs: number;
  readonly note: string;
}

const ROWS: readonly CommandRow[] = [
  ...COMMANDS.flatMap((measured) => [
    { name: measured.name, measured, count: measured.count, paceMs: 0, note: '' },
    {
      name: `${measured.name}, paced`,
      measured,
      count: PACED_COUNT,
      paceMs: PACE_MS,
      note: `one each ${PACE_MS} ms`,
    },
  ]),
  {
    name: NV_INCREMENT.name,
    measured: NV_INCREMENT,
    count: NV_INCREMENT.count,
    paceMs: 0,
    note: 'durable here (encrypted, two processes, fdatasync); swtpm renames a file and syncs nothing',
  },
];

/**
 * What a guest waits for: round trips on the raw door of a vTPM, and on the data socket of Debian's swtpm. The client has
 * one CPU for itself, whoever answers it another one.
 */
export const commandSuite: Suite = {
  names: ROWS.map(({ name }) => name),
  async run(context: RowContext): Promise<void> {
    const swtpm = await startSwtpm();
    const installation = await Installation.create();
    try {
      await installation.startManager();
      // As the peer: what its price is, other rows say.
      await installation.startSupervisor({ args: ['--checkpoint', 'off'] });
      for (const wanted of COMMANDS.concat(NV_INCREMENT)) {
        const rows = ROWS.filter(({ name, measured }) => measured === wanted && context.wanted(name));
        if (rows.length === 0) continue;
        // A vTPM for each command, so that no row sees what another one left behind.
        pin(process.pid, undefined);
        const name = `bench-${COMMANDS.indexOf(wanted) + 1}`;
        const door = await installation.vtpm(name);
        const here = new BlockingClient(door);
        await swtpm.restart();
        const there = new BlockingClient(swtpm.socket);
        pin(process.pid, CLIENT_CPU);
        pin(await installation.workerPid(name), TPM_CPU);
        pin(swtpm.process.pid ?? 0, TPM_CPU);
        const ourBytes = wanted.prepare(here);
        const peerBytes = wanted.prepare(there);
        for (const { name: rowName, count, paceMs, note } of rows) {
          // Node compiles what runs often, and goes on doing so for some thousand commands.
          for (const [client, bytes] of [[here, ourBytes] as const, [there, peerBytes] as const]) {
            client.measure(bytes, WARM_UP_ROUNDS * wanted.count, 0);
          }
          const [ours, peer] = await interleaved(context.effort.rounds, [
            () => here.measure(ourBytes, count, paceMs).map(microseconds),
            () => there.measure(peerBytes, count, paceMs).map(microseconds),
          ]);
          context.report(row(rowName, 'us', ours!, { name: 'swtpm', ...peer! }, note));
        }
        here.close();
        there.close();
      }
    } finally {
      pin(process.pid, undefined);
      await installation.destroy();
      await swtpm.stop();
    }
  },
};

function microseconds(milliseconds: number): number {
  return milliseconds * 1000;
}
