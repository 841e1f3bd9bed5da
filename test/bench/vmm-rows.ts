import { mkdtempSync, rmSync } from 'node:fs';
import { createConnection } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { Installation } from '../support/installation.js';
import { startSwtpmForVmm } from '../support/swtpm.js';
import { TpmClient } from '../support/tpm-client.js';
import { createPrimaryRsa } from '../support/tpm-commands.js';
import { u32, Vmm } from '../support/vmm.js';
import { BlockingClient } from './blocking-client.js';
import { pin } from './process-figures.js';
import { type RowContext, row, type Suite } from './row.js';
import { interleaved } from './statistics.js';
import { COMMANDS } from './tpm-bytes.js';

const CLIENT_CPU = 0;
const TPM_CPU = 1;
const WARM_UP_ROUNDS = 2;
const KEYS_PER_ROUND = 3;
const STARTUP_CLEAR = '80010000000c000001440000';

const CONTROL_ROW = 'Control channel while an RSA key is made';
const OVER = "over a VMM's data channel";
const MEASURED = COMMANDS.filter(({ name }) => name === 'GetRandom' || name === 'PCR_Extend');

/** What a VMM waits for: its own requests while the TPM is busy, and its guest's commands over the channel that it gave. */
export const vmmSuite: Suite = {
  names: [CONTROL_ROW, ...MEASURED.map(({ name }) => `${name} ${OVER}`)],
  async run(context: RowContext): Promise<void> {
    const directory = mkdtempSync(join(tmpdir(), 'vtpm-bench-'));
    const swtpm = await startSwtpmForVmm(directory);
    const installation = await Installation.create();
    const connect = (path: string): Vmm => new Vmm(new TpmClient(createConnection(path)));
    try {
      await installation.startManager();
      // As the peer: what its price is, other rows say.
      await installation.startSupervisor({ args: ['--checkpoint', 'off'] });
      await installation.ctlJson('create', 'bench', '--doors', 'control', '--startup', 'none');
      await installation.ctlJson('start', 'bench');
      const here = connect(join(installation.paths.supervisor.doors, 'bench', 'control.sock'));
      const there = connect(swtpm.control);
      if (context.wanted(CONTROL_ROW)) {
        for (const vmm of [here, there]) {
          if ((await vmm.powerOn()) !== 0) throw new Error('INIT failed');
          await vmm.data?.transmit(STARTUP_CLEAR);
        }
        const [ours, peer] = await interleaved(context.effort.rounds, [
          () => whileMakingKeys(here),
          () => whileMakingKeys(there),
        ]);
        context.report(row(CONTROL_ROW, 'ms', ours!, { name: 'swtpm', ...peer! }, 'GET_TPMESTABLISHED'));
      }
      here.close();
      there.close();
      for (const measured of MEASURED) {
        const name = `${measured.name} ${OVER}`;
        if (!context.wanted(name)) continue;
        const vmms = [
          connect(join(installation.paths.supervisor.doors, 'bench', 'control.sock')),
          connect(swtpm.control),
        ];
        const clients = await Promise.all(vmms.map(powered));
        pin(process.pid, CLIENT_CPU);
        pin(await installation.workerPid('bench'), TPM_CPU);
        pin(swtpm.process.pid ?? 0, TPM_CPU);
        const bytes = clients.map((client) => measured.prepare(client));
        const measure = (index: number, count: number): number[] => {
          const [client, command] = [clients[index], bytes[index]];
          if (!client || !command) throw new Error('no client');
          return client.measure(command, count, 0).map((milliseconds) => milliseconds * 1000);
        };
        // Node compiles what runs often, and goes on doing so for some thousand commands.
        for (const index of [0, 1]) measure(index, WARM_UP_ROUNDS * measured.count);
        const [ours, peer] = await interleaved(context.effort.rounds, [
          () => measure(0, measured.count),
          () => measure(1, measured.count),
        ]);
        context.report(row(name, 'us', ours!, { name: 'swtpm', ...peer! }, 'a socket pair of SET_DATAFD'));
        pin(process.pid, undefined);
        for (const client of clients) client.close();
        for (const vmm of vmms) vmm.close();
      }
    } finally {
      pin(process.pid, undefined);
      await installation.destroy();
      await swtpm.stop();
      rmSync(directory, { recursive: true, force: true });
    }
  },
};

/** A TPM that is on and started, behind the data channel. */
async function powered(vmm: Vmm): Promise<BlockingClient> {
  const { result, fd } = await vmm.giveDataFd();
  if (result !== 0) throw new Error(`SET_DATAFD: ${result}`);
  const init = await vmm.result('INIT', u32(0));
  if (init !== 0) throw new Error(`INIT: ${init}`);
  const client = new BlockingClient(fd);
  client.transmit(Buffer.from(STARTUP_CLEAR, 'hex'));
  return client;
}

/** Milliseconds of each answer on the control channel while the TPM makes keys. */
async function whileMakingKeys(vmm: Vmm): Promise<number[]> {
  const times: number[] = [];
  for (let key = 0; key < KEYS_PER_ROUND; key++) {
    let isMade = false;
    const made = vmm.data?.transmit(createPrimaryRsa()).then((answer) => {
      isMade = true;
      return answer;
    });
    while (!isMade) {
      const start = performance.now();
      await vmm.answer('GET_TPMESTABLISHED');
      times.push(performance.now() - start);
    }
    const answer = await made;
    // TPM2_FlushContext
    if (answer) await vmm.data?.transmit(`80010000000e00000165${answer.toString('hex', 10, 14)}`);
  }
  return times;
}
