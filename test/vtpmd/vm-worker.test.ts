import assert from 'node:assert/strict';
import { fileURLToPath } from 'node:url';
import { MiniManager } from '../support/mini-manager.js';
import {
  counterOf,
  createPrimaryEcc,
  getHandles,
  getRandom,
  handlesOf,
  nvDefineCounter,
  nvIncrement,
  nvReadCounter,
  responseCode,
} from '../support/tpm-commands.js';
import { until } from '../support/until.js';
import { WorkerProcess } from '../support/worker-process.js';

const INDEX = 0x01500001;
const TRANSIENT = 0x80000000;
const relay = fileURLToPath(new URL('../support/vm-stand-in.js', import.meta.url));

describe('worker in a VM, over its relay', () => {
  let manager: MiniManager;
  let workers: WorkerProcess[];

  beforeEach(() => {
    manager = new MiniManager();
    workers = [];
  });

  afterEach(async () => {
    for (const worker of workers) await worker.kill();
    manager.stop();
  });

  function spawnWorker(): WorkerProcess {
    const worker = new WorkerProcess(manager, { relay });
    workers.push(worker);
    return worker;
  }

  it('serves, saves and stops as one in a sandbox does, and the next has the same TPM', async () => {
    const first = await spawnWorker().serve();
    const client = first.connect('tpm');
    await client.transmit(nvDefineCounter(INDEX));
    await client.transmit(nvIncrement(INDEX));
    first.send({ type: 'stop' });
    await first.heard('stopped');
    assert.deepEqual(await first.exited, { code: 0, signal: null });

    const second = await spawnWorker().serve();
    assert.equal((await second.heard('serving')).epoch, 2);
    assert.equal(counterOf(await second.connect('tpm').transmit(nvReadCounter(INDEX))), 1n);
  });

  it('answers many connections, each its own commands in order, one of which takes no answers', async () => {
    const worker = await spawnWorker().serve();
    const stuck = worker.connect('tpm');
    stuck.socket.pause();
    for (let i = 0; i < 4000; i++) stuck.send(getRandom(32));
    const clients = Array.from({ length: 20 }, () => worker.connect('tpm'));
    await Promise.all(
      clients.map(async (client, index) => {
        const sizes = Array.from({ length: 20 }, (_, turn) => 1 + ((index + turn) % 32));
        for (const size of sizes) client.send(getRandom(size));
        for (const size of sizes) assert.equal((await client.response()).length, 12 + size);
      }),
    );
    stuck.socket.resume();
    for (let i = 0; i < 4000; i++) assert.equal((await stuck.response()).length, 44);
  });

  it('answers what was sent before the client ended its half, and then ends too', async () => {
    const worker = await spawnWorker().serve();
    const client = worker.connect('tpm');
    for (let i = 0; i < 50; i++) client.send(getRandom());
    client.socket.end();
    for (let i = 0; i < 50; i++) assert.equal(responseCode(await client.response()), 0);
    await client.ended;
    assert.equal(typeof (await worker.heard('connection-closed')).id, 'number');
  });

  it('flushes what a client left when the supervisor says that its process is gone', async () => {
    const worker = await spawnWorker().serve();
    const client = worker.connect('tcti', 4711);
    assert.equal(responseCode(await client.transmit(createPrimaryEcc())), 0);
    client.close();
    await worker.heard('connection-closed');
    const raw = worker.connect('tpm');
    assert.equal(handlesOf(await raw.transmit(getHandles(TRANSIENT))).length, 1);
    worker.send({ type: 'peer-gone', peer: 4711 });
    await until(
      'the object is flushed',
      async () => handlesOf(await raw.transmit(getHandles(TRANSIENT))).length === 0 || undefined,
    );
  });

  it('takes clients whose process nobody knows to be gone when the next one comes', async () => {
    const worker = await spawnWorker().serve();
    const client = worker.connect('tcti');
    assert.equal(responseCode(await client.transmit(createPrimaryEcc())), 0);
    const closed = worker.next('connection-closed');
    client.close();
    await closed;
    const raw = worker.connect('tpm');
    assert.equal(handlesOf(await raw.transmit(getHandles(TRANSIENT))).length, 1);
    const isNext = worker.next('connection-closed');
    // As tpm2-tss does first of all.
    worker.connect('tcti').close();
    await isNext;
    assert.equal(handlesOf(await raw.transmit(getHandles(TRANSIENT))).length, 0);
  });

  it('holds what must be saved while its link is lost, and goes on over a new one', async () => {
    const worker = await spawnWorker().serve('clear', { holdMs: { tpm: 60_000, tcti: 60_000 } });
    const client = worker.connect('tpm');
    await client.transmit(nvDefineCounter(INDEX));
    const isLost = worker.next('link-lost');
    manager.cut();
    await isLost;
    client.send(nvIncrement(INDEX));
    worker.relink();
    assert.equal(responseCode(await client.response()), 0);
    assert.equal(counterOf(await client.transmit(nvReadCounter(INDEX))), 1n);
  });

  it('ends with its supervisor, and the relay with the VM', async () => {
    const abandoned = await spawnWorker().serve();
    abandoned.abandon();
    assert.deepEqual(await abandoned.exited, { code: 2, signal: null });
    const worker = await spawnWorker().serve();
    process.kill(Number(/guest (\d+)/.exec(worker.log)?.[1]), 'SIGKILL');
    assert.deepEqual(await worker.exited, { code: 1, signal: null });
  });
});
