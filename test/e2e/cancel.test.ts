import assert from 'node:assert/strict';
import { createConnection } from 'node:net';
import { setImmediate } from 'node:timers/promises';
import { openSwtpm } from 'tpm2-ts-bindings';
import { FrontendClient, FrontendError } from 'vtpm-frontend-driver';
import { Installation } from '../support/installation.js';
import { isA } from '../support/is-a.js';
import { TpmClient } from '../support/tpm-client.js';
import {
  createPrimaryRsa,
  flushContext,
  getHandles,
  getRandom,
  handlesOf,
  responseCode,
} from '../support/tpm-commands.js';

const TPM_RC_CANCELED = 0x909;
const TRANSIENT = 0x80000000;
/** libtpms looks between two candidates for a prime, and some keys have theirs at once. */
const MOST_KEYS = 25;
const key = (number: number) => createPrimaryRsa(3072, Buffer.alloc(32, number));

describe('a key that nobody wants any more', () => {
  let installation: Installation;
  let raw: TpmClient;

  before(async () => {
    installation = await Installation.create({ tpm: 'embedded' });
    await installation.start();
    await installation.vtpm('web1');
    raw = new TpmClient(createConnection(installation.door('web1')));
  });
  after(async () => {
    raw?.close();
    await installation?.destroy();
  });

  /** Objects that are loaded; they are flushed. Over a connection that comes after every command that was sent before. */
  async function loaded(): Promise<number> {
    const client = new TpmClient(createConnection(installation.door('web1')));
    const handles = handlesOf(await client.transmit(getHandles(TRANSIENT)));
    for (const handle of handles) assert.equal(responseCode(await client.transmit(flushContext(handle))), 0);
    client.close();
    return handles.length;
  }

  /** Until one of them was not made, which is where the queue goes on all the same. */
  async function untilCancelled(give: (command: Buffer) => Promise<void>): Promise<void> {
    for (let number = 0; number < MOST_KEYS; number++) {
      await give(key(number));
      if ((await loaded()) === 0) return;
    }
    assert.fail('every key was made');
  }

  it('is given up by a client of the frontend that aborts', async () => {
    await untilCancelled(async (command) => {
      const client = await FrontendClient.connect(installation.door('web1'));
      await client.transmit(getRandom());
      const abort = new AbortController();
      const transmitted = client.transmit(command, { signal: abort.signal });
      abort.abort();
      await assert.rejects(transmitted, (error) => isA(error, FrontendError) && error.code === 'aborted');
      await client.close();
    });
  });

  it('is given up by a client of the frontend whose time is over', async () => {
    await untilCancelled(async (command) => {
      const client = await FrontendClient.connect(installation.door('web1'));
      await client.transmit(getRandom());
      const isLate = (error: unknown) => isA(error, FrontendError) && error.code === 'deadline';
      await assert.rejects(client.transmit(command, { deadline: 1 }), isLate);
      await client.close();
    });
  });

  it('is given up over the control door of the TSS, and its client is told so', async () => {
    const codes = new Set<number>();
    for (let number = 0; number < MOST_KEYS && !codes.has(TPM_RC_CANCELED); number++) {
      const path = installation.door('web1', 'tcti');
      const transport = await openSwtpm({ data: { path }, control: { path: `${path}.ctrl` } });
      let isDone = false;
      const made = transport.transmit(key(number)).finally(() => {
        isDone = true;
      });
      // It may be sure that it has asked already: others must have their turn.
      for (; !isDone; await setImmediate()) await transport.cancel?.();
      codes.add(responseCode(await made));
      // The same connection goes on.
      assert.equal(responseCode(await transport.transmit(getRandom())), 0);
      await transport.close();
    }
    codes.delete(0);
    assert.deepEqual([...codes], [TPM_RC_CANCELED]);
  });

  it('is made where somebody waits for it, however many others give up', async () => {
    const path = installation.door('web1', 'tcti');
    for (let number = 0; number < 3; number++) {
      const transport = await openSwtpm({ data: { path }, control: { path: `${path}.ctrl` } });
      const made = raw.transmit(key(number));
      const client = await FrontendClient.connect(installation.door('web1'));
      const late = client.transmit(getRandom(), { deadline: 1 }).catch(() => undefined);
      await transport.cancel?.();
      assert.equal(responseCode(await made), 0);
      await late;
      assert.equal(await loaded(), 1);
      await client.close();
      await transport.close();
    }
  });

  it('is no reason for the supervisor to wait', async () => {
    for (let number = 0, wasHeard = false; !wasHeard; number++) {
      assert.ok(number < MOST_KEYS, 'the supervisor never answered while a key was made');
      let isMade = false;
      const made = raw.transmit(key(number)).finally(() => {
        isMade = true;
      });
      const { body } = await installation.supervisord('GET', '/vtpms/web1');
      assert.equal(body.state, 'running');
      wasHeard = !isMade;
      assert.equal(responseCode(await made), 0);
      assert.equal(await loaded(), 1);
    }
  });
});
