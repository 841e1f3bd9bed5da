import { once } from 'node:events';
import { createConnection } from 'node:net';
import { setTimeout as delay } from 'node:timers/promises';
import { Installation } from '../support/installation.js';
import { TpmClient } from '../support/tpm-client.js';
import { createPrimaryRsa, flushContext, responseCode } from '../support/tpm-commands.js';
import { request, u32 } from '../support/vmm.js';
import { type RowContext, row, type Suite } from './row.js';
import { median, percentile, type Spread } from './statistics.js';

const CONTROL = 'Control channel, a key is made';
const TSS = "TSS's control channel, a key is made";
const QUIET = 'Control channel, quiet';
/** Answers that are waited for. */
const ANSWERS = 300;
const PAUSE_MS = 2;

/** Whether a VMM and the TSS are heard while the TPM is busy. The goal is 5 ms. */
export const busySuite: Suite = {
  names: [CONTROL, TSS, QUIET],
  async run({ wanted, report }: RowContext): Promise<void> {
    const installation = await Installation.create();
    try {
      await installation.start();
      const raw = await installation.vtpm('bench', '--doors', 'tpm,tcti,control');
      const vmm = await connect(raw.replace(/tpm\.sock$/, 'control.sock'));
      vmm.send(request('INIT', u32(0)));
      await vmm.bytes(4);
      const guest = await connect(raw);
      const tss = await connect(raw.replace(/tpm\.sock$/, 'tcti.sock.ctrl'));
      const add = (name: string, took: number[], note: string): void =>
        report(row(name, 'ms', spread(took), null, note));
      if (wanted(CONTROL))
        add(CONTROL, await whileBusy(guest, vmm), 'GET_CAPABILITY while RSA-3072 primaries are made');
      if (wanted(TSS)) add(TSS, await whileBusy(guest, tss), 'the same at tcti.sock.ctrl');
      if (wanted(QUIET)) add(QUIET, await asked(vmm, ANSWERS), `one each ${PAUSE_MS} ms`);
      for (const client of [vmm, guest, tss]) client.close();
    } finally {
      await installation.destroy();
    }
  },
};

function spread(values: readonly number[]): Spread {
  return { p50: median(values), p99: percentile(values, 0.99) };
}

async function connect(path: string): Promise<TpmClient> {
  const socket = createConnection(path);
  await once(socket, 'connect');
  return new TpmClient(socket);
}

/** Milliseconds of answers that were asked for while a key was made, whenever they came. */
async function whileBusy(guest: TpmClient, control: TpmClient): Promise<number[]> {
  const took: number[] = [];
  for (let number = 0; took.length < ANSWERS; number++) {
    let isMade = false;
    const made = guest.transmit(createPrimaryRsa(3072, Buffer.alloc(32, number & 0xff))).finally(() => {
      isMade = true;
    });
    await delay(PAUSE_MS);
    while (!isMade) {
      took.push(await ask(control));
      await delay(PAUSE_MS);
    }
    const answer = await made;
    if (responseCode(answer) === 0) await guest.transmit(flushContext(answer.readUInt32BE(10)));
  }
  return took;
}

async function asked(control: TpmClient, count: number): Promise<number[]> {
  const took: number[] = [];
  for (let asking = 0; asking < count; asking++) {
    await delay(PAUSE_MS);
    took.push(await ask(control));
  }
  return took;
}

async function ask(control: TpmClient): Promise<number> {
  const begin = performance.now();
  control.send(request('GET_CAPABILITY'));
  await control.bytes(8);
  return performance.now() - begin;
}
