import assert from 'node:assert/strict';
import { closeSync } from 'node:fs';
import { Socket } from 'node:net';
import { socketPair } from 'vtpm-common/libc';
import { FrontendPage } from 'vtpm-frontend-driver';
import { mapShared, sendNow, sendWithDescriptors, viewOf } from 'vtpm-frontend-driver/system-calls';
import { RingConnection } from 'vtpmd/ring/ring-connection';
import type { CommandSource } from 'vtpmd/worker/command-source';
import { memoryOf, SEAL, SETUP } from '../support/raw-frontend.js';
import { getRandom } from '../support/tpm-commands.js';
import { until } from '../support/until.js';

describe('an answer that does not fit into its ring', () => {
  it('is not cut and not replaced by another: the ring is closed, and says why', async () => {
    const [here, there] = socketPair();
    const [event, eventThere] = socketPair();
    const memory = memoryOf(4096, SEAL.SHRINK);
    const page = new FrontendPage(viewOf(mapShared(memory, 4096), 4096));
    const queue = {
      submit: (source: CommandSource): void => source.answer(Buffer.alloc(4096)),
      cancel: () => false,
    };
    let isClosed = false;
    const connection = new RingConnection(there, { id: 1, queue }, () => {
      isClosed = true;
    });
    sendWithDescriptors(here, Buffer.from(SETUP), [memory, eventThere]);
    connection.start(false);
    const frontend = new Socket({ fd: here }).setEncoding('latin1');
    let said = '';
    frontend.on('data', (text: string) => {
      said += text;
    });
    page.submit(getRandom(), 0);
    sendNow(event, Buffer.of(0));
    await until('it is closed', () => isClosed);
    await until('it has said why', () => said.includes('4096 bytes does not fit'));
    assert.match(said, /state=4\n\n.*state=6\n/s);
    assert.equal(page.state, 1, 'there is no answer');
    frontend.destroy();
    for (const fd of [event, eventThere, memory]) closeSync(fd);
  });
});
