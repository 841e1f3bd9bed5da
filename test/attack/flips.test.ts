import assert from 'node:assert/strict';
import { ManagerError } from 'vtpm-manager';
import { decodeRecord } from 'vtpm-manager/records/index';
import { type AnchoredStore, openAnchoredStore, type StateStore } from 'vtpm-manager/store/index';
import { type Lmdb, openLmdb, refusal, StoreFixture } from '../manager/store-fixture.js';
import { isA } from '../support/is-a.js';
import { until } from '../support/until.js';
import type { TestVtpm } from '../support/worker-client.js';
import { savedRecord } from './saved-record.js';
import { keyOf, refusedBecause, Target } from './target.js';

const POSITIONS = 2_000;

/** `count` different bits of `bytes` bytes: the same share of each stretch, somewhere in it. */
function sample(bytes: number, count: number): number[] {
  const stretch = (bytes * 8) / count;
  return Array.from({ length: count }, (_, at) => Math.floor((at + Math.random()) * stretch));
}

function flipped(value: Buffer, bit: number): Buffer {
  const copy = Buffer.from(value);
  const at = bit >> 3;
  copy.writeUInt8(copy.readUInt8(at) ^ (1 << (bit & 7)), at);
  return copy;
}

describe(`attack: one bit of a saved record is flipped, at ${POSITIONS} places`, function () {
  this.timeout(120_000);
  const fixture = new StoreFixture();
  const { keys } = fixture.anchor;
  const saved = [savedRecord(keys), savedRecord(keys)] as const;
  const [victim, neighbour] = [saved[0].vtpm, saved[1].vtpm];
  let db: Lmdb;
  let good: Buffer;
  let bits: number[];

  before(async () => {
    const store = await fixture.create();
    for (const { vtpm, bytes } of saved) await store.write(keyOf(vtpm), 0, bytes);
    await store.close();
    db = openLmdb(fixture.directory);
    good = Buffer.from(db.getEntry(keyOf(victim))!.value);
    bits = sample(good.length, POSITIONS);
  });
  after(async () => {
    await db?.close();
    await fixture.destroy();
  });

  /** The store process may look at what it saw a moment ago. */
  async function put(raw: StateStore, value: Buffer): Promise<void> {
    db.transactionSync(() => db.putSync(keyOf(victim), value, 1));
    while (!(await raw.get(keyOf(victim)))?.value.equals(value));
  }

  it('I-5 the record is refused by its name, its neighbour is not', () => {
    for (const bit of bits) {
      assert.throws(
        () => decodeRecord(keys, victim.uuid, flipped(good, bit)),
        (error) => {
          assert.ok(isA(error, ManagerError), `bit ${bit}: ${error}`);
          // A format or a generation of the root key that there is not (yet, any more) is named for what it says.
          assert.match(error.code, /^(store-corrupt|newer-format|rollback-detected)$/, `bit ${bit}`);
          assert.ok(error.message.includes(victim.id), `bit ${bit}: ${error.message}`);
          return true;
        },
        `bit ${bit}`,
      );
    }
    assert.equal(decodeRecord(keys, victim.uuid, good).header.generation, 1n, 'positive control');
    assert.equal(
      decodeRecord(keys, neighbour.uuid, db.getEntry(keyOf(neighbour))!.value).header.generation,
      1n,
    );
  });

  it('I-5 the store is refused at its opening, whole', async () => {
    const raw = await fixture.open();
    for (const bit of bits) {
      await put(raw, flipped(good, bit));
      await assert.rejects(
        openAnchoredStore(raw, fixture.anchor),
        refusal('rollback-detected', /not what was last written/),
        `bit ${bit}`,
      );
    }
    await put(raw, good);
    assert.equal((await openAnchoredStore(raw, fixture.anchor)).size, 2, 'positive control');
    await raw.close();
  });

  it('I-5 while it is open the record is refused when it is read, and all that follows', async () => {
    const raw = await fixture.open();
    for (const bit of bits.filter((_, at) => at % 10 === 0)) {
      await put(raw, good);
      const store: AnchoredStore = await openAnchoredStore(raw, fixture.anchor);
      await put(raw, flipped(good, bit));
      assert.equal((await store.read(keyOf(neighbour)))?.version, 1, 'nobody has seen it yet');
      await assert.rejects(
        store.read(keyOf(victim)),
        refusal('store-corrupt', new RegExp(victim.id)),
        `bit ${bit}`,
      );
      await assert.rejects(store.read(keyOf(neighbour)), refusal('store-corrupt'));
    }
    await put(raw, good);
    const store = await openAnchoredStore(raw, fixture.anchor);
    assert.equal((await store.read(keyOf(victim)))?.version, 1, 'positive control');
    await store.close();
  });
});

describe('attack: one bit of a saved record is flipped under the whole manager', () => {
  let target: Target;
  let [victim, neighbour]: TestVtpm[] = [];
  before(async () => {
    target = await Target.create();
    await target.starts();
    victim = await target.vtpm('victim'.repeat(1_000));
    neighbour = await target.vtpm('neighbour');
    await target.manager.stop();
  });
  afterEach(() => target.manager.stop('SIGKILL'));
  after(async () => {
    await target?.destroy();
    await target?.tpm?.stop();
  });

  const put = (value: Buffer, version: number): void =>
    target.tamper((db) => db.putSync(keyOf(victim!), value, version));

  it('I-5 no start takes the store, and the good record starts', async () => {
    const { value, version } = target.record(keyOf(victim!));
    for (const bit of sample(value.length, 12)) {
      put(flipped(value, bit), version);
      await target.refuses('rollback-detected', /the store is not what was last written/);
    }
    put(value, version);
    await target.starts();
    assert.equal((await target.view(victim!)).generation, 1);
  });

  it('I-5 while it runs the Load is refused, the manager locks by name, and the good record is served again', async () => {
    await target.starts();
    const { value, version } = target.record(keyOf(victim!));
    put(flipped(value, sample(value.length, 1)[0]!), version);
    const other = await target.load(neighbour, 1n);
    assert.equal(other.permanent, 'neighbour', 'nobody has read the record yet');
    await assert.rejects(target.load(victim, 1n), refusedBecause('store-corrupt', new RegExp(victim!.id)));
    const locked = await until('the store was looked at again', async () => {
      const { body } = await target.manager.admin('GET', '/health');
      return body.reason === 'rollback-detected' && body;
    });
    assert.equal(locked.status, 'locked');
    put(value, version);
    await until('the good record is there', async () => {
      return (await target.manager.admin('GET', '/health')).body.status === 'ready';
    });
    const worker = await target.load(victim, 1n);
    assert.equal(worker.permanent, 'victim'.repeat(1_000));
    await worker.close();
    await other.close();
  });
});
