import assert from 'node:assert/strict';
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

describe('worker: durable before visible', () => {
  let manager: MiniManager;
  let worker: WorkerProcess;

  beforeEach(async () => {
    manager = new MiniManager();
    // Longer than any test: what is held here is held until the manager is back.
    worker = await new WorkerProcess(manager).serve('clear', { holdMs: { tpm: 60_000, tcti: 60_000 } });
  });

  afterEach(async () => {
    await worker.kill();
    manager.stop();
  });

  it('serves once generation 1 is durable', async () => {
    const serving = await worker.heard('serving');
    assert.equal(serving.epoch, 1);
    assert.ok((serving.generation as number) >= 1);
    assert.equal(serving.generation, manager.saves.length);
    const client = worker.connect('tpm');
    assert.equal((await client.transmit(getRandom())).length, 28);
  });

  it('I-4: lets no answer leave on any door while a save is not acknowledged', async () => {
    const raw = worker.connect('tpm');
    const other = worker.connect('tcti');
    assert.equal(responseCode(await raw.transmit(nvDefineCounter(INDEX))), 0);
    await other.transmit(getRandom());

    manager.holdSaves = true;
    const saved = manager.next('SAVE');
    raw.send(nvIncrement(INDEX));
    await saved;
    other.send(getRandom());
    // The clock of the worker's event loop is not ours: what it does while it waits, it has done by now.
    await worker.turn();
    assert.equal(raw.received.length, 0);
    assert.equal(other.received.length, 0);

    manager.release();
    assert.equal(responseCode(await raw.response()), 0);
    assert.equal(responseCode(await other.response()), 0);
  });

  /** An increment whose save the manager holds back, before or after its commit, when the link breaks. */
  async function incrementOverLostLink(hold: 'holdSaves' | 'holdAcks') {
    const client = worker.connect('tpm');
    await client.transmit(nvDefineCounter(INDEX));
    manager[hold] = true;
    const saved = manager.next('SAVE');
    client.send(nvIncrement(INDEX));
    await saved;
    const before = manager.saves.length;
    const lost = worker.next('link-lost');
    manager.cut();
    await lost;
    manager[hold] = false;
    worker.relink();
    assert.equal(responseCode(await client.response()), 0);
    return { client, before };
  }

  it('sends a save again that the manager had not committed when the link broke', async () => {
    const { client, before } = await incrementOverLostLink('holdSaves');
    assert.equal(manager.saves.length, before + 1);
    assert.deepEqual(manager.received.slice(-2), ['RESUME', 'SAVE']);
    assert.equal(counterOf(await client.transmit(nvReadCounter(INDEX))), 1n);
  });

  it('does not send a save again that was committed before the link broke', async () => {
    const { before } = await incrementOverLostLink('holdAcks');
    assert.equal(manager.saves.length, before);
    assert.equal(manager.received.at(-1), 'RESUME');
  });

  it('I-8 holds commands first when the manager is away, and answers them when it is back sooner', async () => {
    const client = worker.connect('tpm');
    await client.transmit(getRandom());
    const lost = worker.next('link-lost');
    manager.cut();
    await lost;
    client.send(getRandom());
    client.send(nvDefineCounter(INDEX));
    await worker.turn();
    assert.equal(client.received.length, 0);
    const up = worker.next('link-up');
    worker.relink();
    await up;
    assert.equal((await client.response()).length, 28);
    assert.equal(responseCode(await client.response()), 0);
  });

  it('survives a link that breaks again at once', async () => {
    const client = worker.connect('tpm');
    for (let round = 0; round < 3; round++) {
      const lost = worker.next('link-lost');
      manager.cut();
      await lost;
      worker.relink();
    }
    assert.equal(responseCode(await client.transmit(nvDefineCounter(INDEX))), 0);
  });

  it('ends without an answer when the manager acknowledges another save than its own', async () => {
    const client = worker.connect('tpm');
    manager.lieAboutDigest = true;
    client.send(nvDefineCounter(INDEX));
    assert.equal((await worker.heard('failed')).reason, 'protocol');
    assert.deepEqual(await worker.exited, { code: 1, signal: null });
    await client.ended;
    assert.equal(client.received.length, 0);
  });

  it('I-3: ends without an answer when it is fenced', async () => {
    const client = worker.connect('tpm');
    manager.holdSaves = true;
    const saved = manager.next('SAVE');
    client.send(nvDefineCounter(INDEX));
    await saved;
    manager.fence('fenced');
    assert.equal((await worker.heard('failed')).reason, 'fenced');
    assert.deepEqual(await worker.exited, { code: 1, signal: null });
    await client.ended;
    assert.equal(client.received.length, 0);
  });

  it('freezes after the command that runs and its save, and thaws', async () => {
    const client = worker.connect('tpm');
    manager.holdSaves = true;
    const saved = manager.next('SAVE');
    client.send(nvDefineCounter(INDEX));
    await saved;
    manager.send('FREEZE');
    const frozen = manager.next('FROZEN');
    await worker.turn();
    assert.ok(!manager.received.includes('FROZEN'));
    manager.release();
    await frozen;
    assert.equal(responseCode(await client.response()), 0);

    const count = manager.saves.length;
    client.send(nvIncrement(INDEX));
    await worker.turn();
    assert.equal(client.received.length, 0);
    assert.equal(manager.saves.length, count);
    manager.send('THAW');
    assert.equal(responseCode(await client.response()), 0);
  });
});
