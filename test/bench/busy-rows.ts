import { once } from 'node:events';
import { createConnection } from 'node:net';
import { setTimeout as delay } from 'node:timers/promises';
import { Installation } from '../support/installation.js';
import { TpmClient } from '../support/tpm-client.js';
import { createPrimaryRsa, flushContext, responseCode } from '../support/tpm-commands.js';
import { request } from '../support/vmm.js';
import { type RowContext, row, type Suite } from './row.js';
import { median, percentile, type Spread } from './statistics.js';

const TSS = "TSS's control channel, a key is made";
/** Answers that are waited for. */
const ANSWERS = 300;
const PAUSE_MS = 2;

/** Whether the TSS is heard while the TPM is busy. The goal is 5 ms. */
export const busySuite: Suite = {
  names: [TSS],
  async run({ report }: RowContext): Promise<void> {
    const installation = await Installation.create();
    try {
      await installation.start();
      const guest = await connect(await installation.vtpm('bench'));
      const tss = await connect(`${installation.door('bench', 'tcti')}.ctrl`);
      const took = await whileBusy(guest, tss);
      report(
        row(
          TSS,
          'ms',
          spread(took),
          null,
          'GET_CAPABILITY at tcti.sock.ctrl while RSA-3072 primaries are made',
        ),
      );
      for (const client of [guest, tss]) client.close();
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

async function ask(control: TpmClient): Promise<number> {
  const begin = performance.now();
  control.send(request('GET_CAPABILITY'));
  await control.bytes(8);
  return performance.now() - begin;
}
