import assert from 'node:assert/strict';
import grpc from '@grpc/grpc-js';
import { MiniManager } from '../support/mini-manager.js';
import {
  counterOf,
  getRandom,
  nvDefineCounter,
  nvIncrement,
  nvReadCounter,
  responseCode,
} from '../support/tpm-commands.js';
import { WorkerProcess } from '../support/worker-process.js';

const INDEX = 0x01500001;

describe('worker: start and stop', () => {
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

  function spawnWorker(options: { nodeArguments?: string[]; wrapper?: string[] } = {}): WorkerProcess {
    const worker = new WorkerProcess(manager, options);
    workers.push(worker);
    return worker;
  }

  it('is ready with a key of its own and asks for nothing before it has an identity', async () => {
    const ready = await spawnWorker().heard('ready');
    const other = await spawnWorker().heard('ready');
    assert.match(ready.publicKey as string, /^[0-9a-f]{64}$/);
    assert.notEqual(ready.publicKey, other.publicKey);
    assert.match(ready.libtpms as string, /^0\.\d+\.\d+$/);
    assert.equal(manager.epoch, 0n);
  });

  it('stops with Shutdown(CLEAR) saved, and the next worker has the same TPM', async () => {
    const first = await spawnWorker().serve();
    const client = first.connect('tpm');
    await client.transmit(nvDefineCounter(INDEX));
    await client.transmit(nvIncrement(INDEX));
    const saves = manager.saves.length;
    first.send({ type: 'stop' });
    await first.heard('stopped');
    assert.deepEqual(await first.exited, { code: 0, signal: null });
    assert.equal(manager.saves.length, saves + 1);

    const second = await spawnWorker().serve();
    assert.equal((await second.heard('serving')).epoch, 2);
    const again = second.connect('tpm');
    assert.equal(counterOf(await again.transmit(nvReadCounter(INDEX))), 1n);
  });

  it('I-4: keeps each acknowledged increment over kill -9', async () => {
    const first = await spawnWorker().serve();
    const client = first.connect('tpm');
    await client.transmit(nvDefineCounter(INDEX));
    let acknowledged = 0n;
    for (; acknowledged < 20n; acknowledged++) {
      assert.equal(responseCode(await client.transmit(nvIncrement(INDEX))), 0);
    }
    client.send(nvIncrement(INDEX));
    await first.kill();
    const second = await spawnWorker().serve();
    const value = counterOf(await second.connect('tpm').transmit(nvReadCounter(INDEX)));
    assert.ok(value === acknowledged || value === acknowledged + 1n, `${value} after ${acknowledged}`);
  });

  it('leaves Startup to the guest where it is told to', async () => {
    const worker = await spawnWorker().serve('none');
    const client = worker.connect('tpm');
    assert.equal(responseCode(await client.transmit(getRandom())), 0x100);
    assert.equal(responseCode(await client.transmit('80010000000c000001440000')), 0);
    assert.equal(responseCode(await client.transmit(getRandom())), 0);
  });

  it('ends at once when its supervisor is gone', async () => {
    const idle = spawnWorker();
    await idle.heard('ready');
    idle.abandon();
    assert.deepEqual(await idle.exited, { code: 2, signal: null });
    const serving = await spawnWorker().serve();
    serving.abandon();
    assert.deepEqual(await serving.exited, { code: 2, signal: null });
  });

  it("reports the manager's refusal of Load with its reason", async () => {
    manager.refuseLoad = { code: grpc.status.FAILED_PRECONDITION, reason: 'stale-epoch' };
    const worker = spawnWorker();
    const { publicKey } = await worker.heard('ready');
    worker.send(manager.identity(publicKey as string));
    const failed = await worker.heard('failed');
    assert.equal(failed.reason, 'stale-epoch');
    assert.equal(failed.message, 'stale-epoch: not today – é');
    assert.equal((await worker.exited).code, 1);
  });

  it('fails where the manager is gone before Load', async () => {
    const worker = spawnWorker();
    const { publicKey } = await worker.heard('ready');
    manager.cut();
    worker.send(manager.identity(publicKey as string));
    assert.equal((await worker.heard('failed')).reason, 'link-lost');
  });

  it('does not take a grant from another manager', async () => {
    const worker = spawnWorker();
    const { publicKey } = await worker.heard('ready');
    const other = new MiniManager();
    const identity = manager.identity(publicKey as string);
    worker.send({ ...identity, managerKey: Buffer.from(other.keys.publicKey).toString('hex') });
    await worker.heard('failed');
    assert.equal((await worker.exited).code, 1);
    assert.equal(manager.epoch, 0n);
    other.stop();
  });

  it('I-9: makes no new TPM from a state that it cannot use', async () => {
    manager.saves.push({ permanent: Buffer.alloc(1299, 1), digest: Buffer.alloc(32) });
    const worker = spawnWorker();
    const { publicKey } = await worker.heard('ready');
    worker.send(manager.identity(publicKey as string));
    assert.equal((await worker.heard('failed')).reason, 'engine');
    assert.equal(manager.saves.length, 1);
  });

  it('refuses what a supervisor never says', async () => {
    for (const line of [
      { type: 'unheard-of' },
      { type: 'connection', door: 'tpm', id: 1 },
      { type: 'link' },
    ]) {
      const worker = spawnWorker();
      await worker.heard('ready');
      worker.send(line);
      assert.equal((await worker.heard('failed')).reason, 'protocol');
      assert.equal((await worker.exited).code, 1);
    }
  });

  it('closes a connection that came before its time', async () => {
    const worker = spawnWorker();
    await worker.heard('ready');
    const client = worker.connect('tpm');
    await client.ended;
    await worker.heard('connection-closed');
  });

  it('rehearses without a word to the manager, once, and serves after it', async () => {
    const worker = spawnWorker();
    await worker.heard('ready');
    worker.send({ type: 'rehearse' });
    await worker.heard('rehearsed');
    assert.deepEqual([manager.epoch, manager.received], [0n, []]);
    await worker.serve();
    const client = worker.connect('tpm');
    assert.equal(responseCode(await client.transmit(nvDefineCounter(INDEX))), 0);
    const twice = spawnWorker();
    await twice.heard('ready');
    twice.send({ type: 'rehearse' });
    twice.send({ type: 'rehearse' });
    assert.equal((await twice.heard('failed')).reason, 'protocol');
  });

  it('has its code compiled anew for what a guest does, and for nothing before there is one', async () => {
    const toStandardError = ['sh', '-c', 'exec "$0" "$@" >&2'];
    const worker = spawnWorker({ wrapper: toStandardError, nodeArguments: ['--trace-opt'] });
    await worker.heard('ready');
    worker.send({ type: 'rehearse' });
    await worker.heard('rehearsed');
    assert.doesNotMatch(worker.log, /completed optimizing/);
    await worker.serve();
    const client = worker.connect('tpm');
    while (!worker.log.includes('completed optimizing')) await client.transmit(getRandom());
  });

  it('takes an identity in the middle of its rehearsal', async () => {
    const worker = spawnWorker();
    await worker.heard('ready');
    worker.send({ type: 'rehearse' });
    await worker.serve();
    assert.deepEqual(
      worker.messages.map(({ type }) => type),
      ['ready', 'rehearsed', 'serving'],
    );
    assert.equal(responseCode(await worker.connect('tpm').transmit(getRandom())), 0);
  });

  it('waits for its identity over one lost link after the other, and uses the last one', async () => {
    const worker = spawnWorker();
    await worker.heard('ready');
    for (let lost = 0; lost < 3; lost++) {
      const isLost = worker.next('link-lost');
      manager.cut();
      await isLost;
      const isUp = worker.next('link-up');
      worker.relink();
      await isUp;
    }
    await worker.serve();
    assert.equal(responseCode(await worker.connect('tpm').transmit(getRandom())), 0);
  });

  it('I-4 says the first thing to save in the breath of its greeting, once', async () => {
    await spawnWorker().serve();
    assert.deepEqual(manager.received, ['HELLO', 'SAVE']);
    assert.equal(manager.saves.length, 1, 'a new TPM and its Startup are one save');
  });

  it('logs neither state nor keys', async () => {
    const worker = await spawnWorker().serve();
    worker.send({ type: 'stop' });
    await worker.exited;
    for (const line of worker.log.trim().split('\n')) {
      const { msg } = JSON.parse(line) as { msg: string };
      assert.ok(msg.length < 200);
    }
  });

  it('writes an answer in two halves for a fault test', async () => {
    // The hook stops the process where a crash is tested: here it dies with half an answer out.
    const hook =
      "globalThis[Symbol.for('vtpm.barrier')] = (name) => { if (name === 'half-answer') process.abort(); };";
    const url = `data:text/javascript,${encodeURIComponent(hook)}`;
    const worker = await spawnWorker({ nodeArguments: ['--import', url] }).serve();
    const client = worker.connect('tpm');
    client.send(getRandom(16));
    assert.equal((await worker.exited).signal, 'SIGABRT');
    await client.ended;
    assert.equal(client.received.length, 14);
  });
});
