import assert from 'node:assert/strict';
import { ManagerError } from 'vtpm-manager';
import { type AnchoredStore, createAnchoredStore, openAnchoredStore } from 'vtpm-manager/store/index';
import { MemoryCounter } from '../support/memory-counter.js';
import { MemoryStore, storeFull } from '../support/memory-store.js';
import { anchorOptions, testKeys } from '../support/test-keys.js';
import { until } from '../support/until.js';
import { refusal } from './store-fixture.js';

const value = Buffer.from('x');

/** Lets an increment wait until it is let go. */
class Gate {
  readonly #waiting: (() => void)[] = [];
  isOpen = false;

  readonly wait = (): Promise<void> =>
    this.isOpen ? Promise.resolve() : new Promise((resolve) => this.#waiting.push(resolve));

  get waiting(): number {
    return this.#waiting.length;
  }

  open(): void {
    this.isOpen = true;
    for (const resolve of this.#waiting.splice(0)) resolve();
  }
}

/** Whether a promise has settled after a few turns of the event loop. */
async function isSettled(promise: Promise<unknown>): Promise<boolean> {
  let settled = false;
  promise.then(
    () => (settled = true),
    () => (settled = true),
  );
  for (let turn = 0; turn < 20; turn++) await new Promise((resolve) => setImmediate(resolve));
  return settled;
}

describe('what the TPM counts', () => {
  let disk: MemoryStore;
  let counter: MemoryCounter;
  let store: AnchoredStore;
  const keys = testKeys();
  const options = (windowMs = 3_600_000) => ({ ...anchorOptions(keys, counter), windowMs });
  const open = (windowMs?: number) => openAnchoredStore(disk, options(windowMs));

  beforeEach(async () => {
    disk = new MemoryStore();
    counter = new MemoryCounter(7n);
    store = await createAnchoredStore(disk, options());
  });

  it('plain writes cost no step, and one when the store is closed', async () => {
    for (let i = 0; i < 100; i++) await store.write(`k/${i}`, 0, value);
    assert.equal(counter.increments, 0);
    await store.close();
    assert.equal(counter.increments, 1);
    const again = await open();
    await again.close();
    assert.equal(counter.increments, 1, 'nothing was written: nothing is counted');
  });

  it('I-5 an audit log that has grown is anchored and counted when the store is closed', async () => {
    const grown = { length: 3n, digest: Buffer.alloc(32, 3) };
    const again = await openAnchoredStore(disk, { ...options(), auditHead: () => grown });
    await again.close();
    assert.equal(counter.increments, 1);
    assert.deepEqual((await open()).auditAtOpen, grown);
  });

  it('plain writes are counted together when the window is over', async () => {
    await store.close();
    store = await open(50);
    for (let i = 0; i < 10; i++) await store.write(`k/${i}`, 0, value);
    await until('the window is over', () => counter.increments === 1);
    await store.write('k/0', 1, value);
    await until('the next window is over', () => counter.increments === 2);
  });

  it('I-5 a write that has to be counted is not acknowledged before it is; plain ones beside it are', async () => {
    const gate = new Gate();
    counter.beforeIncrement = gate.wait;
    const counted = store.write('event', 0, value, 'now');
    await until('the TPM counts', () => gate.waiting === 1);
    await store.write('plain', 0, value);
    const second = store.write('event/2', 0, value, 'now');
    assert.equal(await isSettled(Promise.race([counted, second])), false);
    gate.open();
    await Promise.all([counted, second]);
    assert.equal(counter.increments, 2);
  });

  it('I-5 the TPM gets ready to count while the anchor is written, and counts when that is on the disk', async () => {
    const counts = counter.increment.bind(counter);
    const steps: string[] = [];
    counter.increment = (stated) => {
      steps.push('gets ready');
      return counts(stated);
    };
    counter.beforeIncrement = () => void steps.push('counts');
    const disks = new Gate();
    disk.beforeCommit = async () => {
      steps.push('is written');
      await disks.wait();
      steps.push('is there');
    };
    const counted = store.write('event', 0, value, 'now');
    assert.equal(await isSettled(counted), false);
    assert.deepEqual(steps, ['gets ready', 'is written']);
    disks.open();
    await counted;
    assert.deepEqual(steps, ['gets ready', 'is written', 'is there', 'counts']);
  });

  it('events that arrive while the TPM counts share its next step', async () => {
    const gate = new Gate();
    counter.beforeIncrement = gate.wait;
    const first = store.write('event', 0, value, 'now');
    await until('the TPM counts', () => gate.waiting === 1);
    const others = Array.from({ length: 20 }, (_, i) => store.write(`event/${i}`, 0, value, 'now'));
    const waits = [store.count(), store.count()];
    gate.open();
    await Promise.all([first, ...others, ...waits]);
    assert.equal(counter.increments, 2);
  });

  it('two writes of one record keep their order where the first has to be counted', async () => {
    const gate = new Gate();
    counter.beforeIncrement = gate.wait;
    const writes = [
      store.write('other', 0, value, 'now'),
      store.write('k', 0, Buffer.from('1'), 'now'),
      store.write('k', 1, Buffer.from('2')),
    ];
    await until('the TPM counts', () => gate.waiting === 1);
    gate.open();
    assert.deepEqual(await Promise.all(writes), [1, 1, 2]);
    assert.equal((await store.read('k'))?.value.toString(), '2');
  });

  it('I-5 a crash between anchor and count: the next start counts, and only forward', async () => {
    const old = await contentOf(disk);
    counter.beforeIncrement = () => new Promise(() => undefined);
    const event = store.write('event', 0, value, 'now');
    event.catch(() => undefined);
    assert.equal(await isSettled(event), false);
    const crashed = await contentOf(disk);
    counter.beforeIncrement = () => undefined;
    // Nobody was told of the event: both disks may be what there is.
    for (const [content, size, increments] of [
      [crashed, 1, 1],
      [old, 0, 0],
    ] as const) {
      const copy = new MemoryStore(content);
      const copied = new MemoryCounter(7n);
      assert.equal((await openAnchoredStore(copy, anchorOptions(keys, copied))).size, size);
      assert.equal(copied.increments, increments);
    }
    // Once the one that says more was started, the other one is old.
    await openAnchoredStore(new MemoryStore(crashed), options());
    await assert.rejects(
      openAnchoredStore(new MemoryStore(old), options()),
      refusal('rollback-detected', /old one: its anchor says 7, the TPM has counted to 8/),
    );
  });

  it('I-5 a disk from before an event is refused, one from the same window is not', async () => {
    await store.write('k', 0, value);
    const inWindow = await contentOf(disk);
    await store.write('k', 1, value);
    assert.equal((await openAnchoredStore(new MemoryStore(inWindow), options())).size, 1);
    await store.write('event', 0, value, 'now');
    await assert.rejects(
      openAnchoredStore(new MemoryStore(inWindow), options()),
      refusal('rollback-detected'),
    );
  });

  it('I-5 an anchor from the future is refused: the memory of the TPM was put back', async () => {
    await store.write('event', 0, value, 'now');
    await store.write('event', 1, value, 'now');
    counter.value = 7n;
    await assert.rejects(open(), refusal('rollback-detected', /memory was put back/));
  });

  it('a TPM that fails is asked again; saves go on, events wait, and nothing is counted twice', async () => {
    let failures = 0;
    counter.beforeIncrement = () => {
      if (failures++ >= 2) return;
      // The first time the chip has counted, and its answer was lost.
      if (failures === 1) counter.value++;
      throw new ManagerError('tpm-unreachable', 'the TPM does not answer');
    };
    const event = store.write('event', 0, value, 'now');
    await until('the TPM failed', () => failures === 1);
    await store.write('plain', 0, value);
    await event;
    assert.equal(counter.value, 8n);
    await store.close();
    assert.equal((await open()).size, 2);
  });

  it('a TPM that fails while the store is closed holds up nothing: the next start counts', async () => {
    await store.write('plain', 0, value);
    counter.beforeIncrement = () => {
      throw new ManagerError('tpm-unreachable', 'the TPM does not answer');
    };
    await store.close();
    counter.beforeIncrement = () => undefined;
    assert.equal((await open()).size, 1);
    assert.equal(counter.value, 8n);
  });

  it('who is to stop does not wait for a TPM that does not answer: what waited is refused, and the next start counts', async () => {
    let failures = 0;
    counter.beforeIncrement = () => {
      failures++;
      throw new ManagerError('tpm-unreachable', 'the TPM does not answer');
    };
    const event = store.write('event', 0, value, 'now');
    const refused = assert.rejects(event, refusal('tpm-unreachable'));
    await until('the TPM failed', () => failures === 1);
    store.stopWaiting();
    await refused;
    await store.close();
    counter.beforeIncrement = () => undefined;
    assert.equal((await open()).size, 1);
    assert.equal(counter.value, 8n);
  });

  it('what was written after that is counted by the close', async () => {
    store.stopWaiting();
    await store.write('plain', 0, value);
    await store.close();
    assert.equal(counter.increments, 1);
  });

  it('a step that finds no room on the disk is due again after a window, and does not keep a close', async () => {
    await store.close();
    store = await open(20);
    await store.write('plain', 0, value);
    let attempts = 0;
    disk.beforeCommit = () => {
      attempts++;
      storeFull();
    };
    await until('it was tried again', () => attempts === 3);
    await store.close();
    const increments = counter.increments;
    disk.beforeCommit = () => undefined;
    assert.equal((await open()).size, 1);
    assert.equal(counter.increments, increments);
  });

  it('I-5 somebody else who counts ends the store', async () => {
    const broken: ManagerError[] = [];
    await store.close();
    store = await openAnchoredStore(disk, { ...options(), onBroken: (error) => broken.push(error) });
    counter.value++;
    await assert.rejects(
      store.write('event', 0, value, 'now'),
      refusal('rollback-detected', /another program/),
    );
    await assert.rejects(store.write('k', 0, value), refusal('rollback-detected'));
    assert.equal(broken.length, 1);
  });

  it('I-4 a write is in the store or not, whatever the disk does between anchor and count', async () => {
    disk.beforeCommit = storeFull;
    await assert.rejects(store.write('event', 0, value, 'now'), refusal('store-full'));
    await assert.rejects(store.count(), refusal('store-full'));
    assert.equal(counter.increments, 0);
    disk.beforeCommit = () => undefined;
    await store.write('event', 0, value, 'now');
    assert.equal(counter.increments, 1);
  });
});

async function contentOf(disk: MemoryStore) {
  return disk.list(undefined, 1000);
}
