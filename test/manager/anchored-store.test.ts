import assert from 'node:assert/strict';
import { createHmac, randomBytes } from 'node:crypto';
import { copyFileSync } from 'node:fs';
import {
  type AnchoredStore,
  createAnchoredStore,
  openAnchoredStore,
  type StateStore,
  type StoreWrite,
} from 'vtpm-manager/store/index';
import { encode } from 'vtpm-proto';
import { anchorOptions, testKeys } from '../support/test-keys.js';
import { contentOf, type Lmdb, refusal, StoreFixture } from './store-fixture.js';

describe('anchored store', () => {
  let fixture: StoreFixture;
  beforeEach(() => {
    fixture = new StoreFixture();
  });
  afterEach(() => fixture.destroy());

  it('gives back what was written, over a restart', async () => {
    const anchored = await fixture.create();
    assert.equal(await anchored.write('trust', 0, Buffer.from('t1')), 1);
    assert.equal(await anchored.write('vtpm/a', 0, Buffer.from('a1')), 1);
    assert.equal(await anchored.write('vtpm/a', 1, Buffer.from('a2')), 2);
    for (const store of [anchored, undefined]) {
      const open = store ?? (await fixture.reopen());
      assert.deepEqual(await open.read('vtpm/a'), { key: 'vtpm/a', version: 2, value: Buffer.from('a2') });
      assert.deepEqual((await open.read('trust'))?.value, Buffer.from('t1'));
      assert.equal(await open.read('vtpm/b'), undefined);
      assert.deepEqual(open.keys(undefined, 10), ['trust', 'vtpm/a']);
      assert.deepEqual(open.keys('trust', 10), ['vtpm/a']);
      assert.equal(open.size, 2);
      await open.close();
    }
  });

  it('does not show or take its anchor', async () => {
    const anchored = await fixture.create();
    assert.equal(anchored.size, 0);
    await assert.rejects(anchored.read('anchor'), refusal('bad-request'));
    await assert.rejects(anchored.write('anchor', 1, Buffer.alloc(1)), refusal('bad-request'));
    await assert.rejects(anchored.write('a b', 0, Buffer.alloc(1)), refusal('bad-request'));
    assert.deepEqual(anchored.keys(undefined, 10), []);
  });

  it('reads many records back, more than a page of them', async () => {
    const anchored = await fixture.create();
    const count = 1300;
    await Promise.all(
      Array.from({ length: count }, (_, i) => anchored.write(`vtpm/${i}`, 0, contentOf(`vtpm/${i}`, 1, 500))),
    );
    await anchored.close();
    const again = await fixture.reopen();
    assert.equal(again.size, count);
    assert.equal(again.keys(undefined, 2000).length, count);
  });

  describe('group commit', () => {
    /** Counts commits; each waits until it is let go. */
    class Gate {
      readonly commits: StoreWrite[][] = [];
      readonly #waiting: (() => void)[] = [];
      isOpen = true;

      wrap = (store: StateStore): StateStore => ({
        get: (key) => store.get(key),
        list: (after, limit) => store.list(after, limit),
        close: () => store.close(),
        commit: async (writes) => {
          this.commits.push([...writes]);
          if (!this.isOpen) await new Promise<void>((resolve) => this.#waiting.push(resolve));
          return store.commit(writes);
        },
      });

      open(): void {
        this.isOpen = true;
        for (const resolve of this.#waiting.splice(0)) resolve();
      }
    }

    it('has one commit under way; what arrives meanwhile shares the next', async () => {
      const gate = new Gate();
      const anchored = await fixture.create(gate.wrap);
      gate.commits.length = 0;
      gate.isOpen = false;
      const writes = [anchored.write('k/first', 0, Buffer.from('x'))];
      await turn();
      for (let i = 0; i < 63; i++) {
        writes.push(anchored.write(`k/${i}`, 0, contentOf(`k/${i}`, 1)));
        if (i % 10 === 0) await turn();
      }
      assert.equal(gate.commits.length, 1);
      gate.open();
      await Promise.all(writes);
      assert.deepEqual(
        gate.commits.map((commit) => commit.length),
        [2, 64],
      );
      for (const commit of gate.commits) assert.equal(commit.at(-1)?.key, 'anchor');
    });

    it('bounds a commit by count and by bytes', async () => {
      const gate = new Gate();
      const anchored = await fixture.create(gate.wrap);
      gate.commits.length = 0;
      await Promise.all(Array.from({ length: 600 }, (_, i) => anchored.write(`k/${i}`, 0, Buffer.alloc(10))));
      assert.deepEqual(
        gate.commits.map((commit) => commit.length),
        [257, 257, 89],
      );
      gate.commits.length = 0;
      await Promise.all(
        Array.from({ length: 5 }, (_, i) => anchored.write(`m/${i}`, 0, Buffer.alloc(4 * 1024 * 1024))),
      );
      assert.deepEqual(
        gate.commits.map((commit) => commit.length),
        [3, 3, 2],
      );
    });

    it('a stale write fails alone', async () => {
      const gate = new Gate();
      const anchored = await fixture.create(gate.wrap);
      await anchored.write('k/1', 0, Buffer.from('v1'));
      gate.commits.length = 0;
      const results = await Promise.allSettled([
        anchored.write('k/0', 0, Buffer.from('x')),
        anchored.write('k/1', 0, Buffer.from('stale')),
        anchored.write('k/1', 2, Buffer.from('from the future')),
        anchored.write('k/1', 1, Buffer.from('v2')),
        anchored.write('k/2', 1, Buffer.from('never was')),
        anchored.write('k/3', 0, Buffer.from('y')),
      ]);
      assert.deepEqual(
        results.map((result) => result.status === 'fulfilled'),
        [true, false, false, true, false, true],
      );
      for (const result of results) if (result.status === 'rejected') refusal('stale')(result.reason);
      assert.equal(gate.commits.length, 1);
      assert.deepEqual((await anchored.read('k/1'))?.value, Buffer.from('v2'));
    });

    it('two writes of one key: the same version is stale, the next version follows', async () => {
      const anchored = await fixture.create();
      const results = await Promise.allSettled([
        anchored.write('k', 0, Buffer.from('one')),
        anchored.write('k', 0, Buffer.from('other')),
        anchored.write('k', 1, Buffer.from('two')),
        anchored.write('k', 2, Buffer.from('three')),
      ]);
      assert.deepEqual(
        results.map((result) => (result.status === 'fulfilled' ? result.value : 'stale')),
        [1, 'stale', 2, 3],
      );
      assert.deepEqual((await anchored.read('k'))?.value, Buffer.from('three'));
    });

    it('of racing writers each version has one winner', async () => {
      const anchored = await fixture.create();
      const wins = new Map<number, number>();
      const writer = async (name: number) => {
        for (let won = 0; won < 5; ) {
          const version = (await anchored.read('k'))?.version ?? 0;
          try {
            const written = await anchored.write('k', version, Buffer.from(`${name}`));
            assert.equal(wins.has(written), false);
            wins.set(written, name);
            won++;
          } catch (error) {
            refusal('stale')(error);
          }
        }
      };
      await Promise.all(Array.from({ length: 8 }, (_, name) => writer(name)));
      assert.equal(wins.size, 40);
      assert.equal((await anchored.read('k'))?.version, 40);
    });

    it('a read beside commits of the same record gives one of its versions, whole', async () => {
      const anchored = await fixture.create();
      await anchored.write('k', 0, contentOf('k', 1));
      let isDone = false;
      const readers = Array.from({ length: 4 }, async () => {
        for (let last = 0; !isDone; ) {
          const entry = await anchored.read('k');
          assert.ok(entry && entry.version >= last);
          assert.deepEqual(entry.value, contentOf('k', entry.version));
          last = entry.version;
        }
      });
      for (let version = 1; version < 200; version++)
        await anchored.write('k', version, contentOf('k', version + 1));
      isDone = true;
      await Promise.all(readers);
    });

    it('a read waits for a commit whose content it meets before its answer', async () => {
      const gate = new Gate();
      let answer: () => void = () => undefined;
      const anchored = await fixture.create((store) => ({
        ...gate.wrap(store),
        commit: async (writes) => {
          const isDone = await store.commit(writes);
          if (writes.some(({ key }) => key === 'k')) await new Promise<void>((resolve) => (answer = resolve));
          return isDone;
        },
      }));
      const write = anchored.write('k', 0, Buffer.from('new'));
      await turn();
      const read = anchored.read('k');
      let isRead = false;
      void read.then(() => (isRead = true));
      // The store process answers in order: after this the read has seen the disk.
      await anchored.read('other');
      await turn();
      assert.equal(isRead, false);
      answer();
      await write;
      assert.deepEqual((await read)?.value, Buffer.from('new'));
    });

    it('closing writes what was asked for, and nothing after', async () => {
      const anchored = await fixture.create();
      const writes = Array.from({ length: 300 }, (_, i) => anchored.write(`k/${i}`, 0, Buffer.from('x')));
      const closed = anchored.close();
      await assert.rejects(anchored.write('late', 0, Buffer.from('x')), refusal('shutting-down'));
      await Promise.all(writes);
      await closed;
      assert.equal((await fixture.reopen()).size, 300);
    });
  });

  it('I-4 every acknowledged write survives kill -9 of the store process, and none is half there', async () => {
    const keys = Array.from({ length: 24 }, (_, i) => `vtpm/${i}`);
    const acknowledged = new Map(keys.map((key) => [key, 0]));
    let anchored = await fixture.create();
    const rounds = 12;
    for (let round = 0; round < rounds; round++) {
      let left = 30 + 17 * round;
      const pid = fixture.childPid();
      const writers = keys.map(async (key) => {
        for (;;) {
          const version = acknowledged.get(key)!;
          const written = await anchored.write(key, version, contentOf(key, version + 1));
          acknowledged.set(key, written);
          if (--left === 0) process.kill(pid, 'SIGKILL');
        }
      });
      for (const ended of await Promise.allSettled(writers)) {
        assert.equal(ended.status, 'rejected');
        refusal('internal', /SIGKILL/)(ended.reason);
      }
      assert.equal(fixture.lost.length, round + 1);
      await assert.rejects(anchored.read('vtpm/0'), refusal('internal', /SIGKILL/));
      // Opening verifies every record against the anchor of the same transaction.
      anchored = await fixture.reopen();
      for (const key of keys) {
        const entry = await anchored.read(key);
        const least = acknowledged.get(key)!;
        const version = entry?.version ?? 0;
        assert.ok(
          version === least || version === least + 1,
          `${key}: ${least} was acknowledged, ${version} is there`,
        );
        if (entry) assert.deepEqual(entry.value, contentOf(key, version));
        acknowledged.set(key, version);
      }
    }
  });

  it('I-4 a full disk fails a batch whole, and the store works on', async () => {
    let isFull = false;
    const anchored = await fixture.create((store) => ({
      get: (key) => store.get(key),
      list: (after, limit) => store.list(after, limit),
      close: () => store.close(),
      commit: (writes) => {
        if (isFull) fixture.limitFiles(1);
        else fixture.limitFiles(undefined);
        return store.commit(writes);
      },
    }));
    await anchored.write('k/0', 0, contentOf('k/0', 1));
    isFull = true;
    const failed = await Promise.allSettled([
      anchored.write('k/0', 1, contentOf('k/0', 2)),
      anchored.write('k/1', 0, contentOf('k/1', 1)),
    ]);
    for (const result of failed) {
      assert.equal(result.status, 'rejected');
      refusal('store-full')(result.reason);
    }
    assert.deepEqual((await anchored.read('k/0'))?.value, contentOf('k/0', 1));
    assert.equal(await anchored.read('k/1'), undefined);
    isFull = false;
    assert.equal(await anchored.write('k/0', 1, contentOf('k/0', 2)), 2);
    await anchored.close();
    const again = await fixture.reopen();
    assert.equal(again.size, 1);
    assert.deepEqual((await again.read('k/0'))?.value, contentOf('k/0', 2));
  });

  describe('changed while nobody watched', () => {
    /** `k/0` and `k/1` at version 2. */
    async function fill(): Promise<void> {
      const anchored = await fixture.create();
      for (const key of ['k/0', 'k/1']) {
        await anchored.write(key, 0, contentOf(key, 1));
        await anchored.write(key, 1, contentOf(key, 2));
      }
      await anchored.close();
    }

    const changes: [string, string, (db: Lmdb) => void][] = [
      ['an old record put back', 'rollback-detected', (db) => db.putSync('k/0', contentOf('k/0', 1), 1)],
      [
        'old content under the new version',
        'rollback-detected',
        (db) => db.putSync('k/0', contentOf('k/0', 1), 2),
      ],
      [
        'the same content under another version',
        'rollback-detected',
        (db) => db.putSync('k/0', contentOf('k/0', 2), 3),
      ],
      [
        'one record in the place of another',
        'rollback-detected',
        (db) => db.putSync('k/0', contentOf('k/1', 2), 2),
      ],
      ['a record removed', 'rollback-detected', (db) => db.removeSync('k/1')],
      ['a record added', 'rollback-detected', (db) => db.putSync('k/2', contentOf('k/2', 1), 1)],
      ['the anchor removed', 'store-corrupt', (db) => db.removeSync('anchor')],
      ['a version that is none', 'store-corrupt', (db) => db.putSync('k/0', contentOf('k/0', 2), 2.5)],
      ['a key that is none', 'store-corrupt', (db) => db.putSync('two words', Buffer.from('x'), 1)],
      [
        'everything removed',
        'store-missing',
        (db) => {
          for (const key of ['k/0', 'k/1', 'anchor']) db.removeSync(key);
        },
      ],
    ];
    for (const [what, code, change] of changes) {
      it(`I-5 ${what} is refused as ${code}, again and again`, async () => {
        await fill();
        fixture.tamper(change);
        await assert.rejects(fixture.reopen(), refusal(code));
        await assert.rejects(fixture.reopen(), refusal(code));
      });
    }

    it('is told apart from an independent writer that changed nothing', async () => {
      await fill();
      fixture.tamper((db) => {
        const { value, version } = db.getEntry('k/0')!;
        db.putSync('k/0', value, version);
      });
      assert.equal((await (await fixture.reopen()).read('k/0'))?.version, 2);
    });

    it('I-5 an anchor put back from before is refused', async () => {
      const anchored = await fixture.create();
      await anchored.write('k/0', 0, contentOf('k/0', 1));
      await anchored.close();
      let old: { value: Buffer; version: number } | undefined;
      fixture.tamper((db) => {
        old = db.getEntry('anchor');
      });
      const again = await fixture.reopen();
      await again.write('k/0', 1, contentOf('k/0', 2));
      await again.close();
      fixture.tamper((db) => db.putSync('anchor', old!.value, old!.version));
      await assert.rejects(fixture.reopen(), refusal('rollback-detected'));
    });

    it('I-5 the anchor of another store is refused, with the right key and with another one', async () => {
      await fill();
      const { storeId, rootKey, counter } = fixture;
      const other = (id: Buffer, key: Buffer) => anchorOptions(testKeys(id, key), counter);
      await assert.rejects(
        fixture.reopen(other(randomBytes(16), rootKey)),
        refusal('store-corrupt', /anchor/),
      );
      await assert.rejects(
        fixture.reopen(other(storeId, randomBytes(32))),
        refusal('store-corrupt', /anchor/),
      );
      assert.equal((await fixture.reopen()).size, 2);
    });

    it('I-5 a changed, cut or empty anchor is refused', async () => {
      await fill();
      let anchor: Buffer = Buffer.alloc(0);
      fixture.tamper((db) => {
        anchor = db.getEntry('anchor')!.value;
      });
      const forged = Buffer.from(anchor);
      forged.writeUInt8(forged.readUInt8(forged.length - 1) ^ 1, forged.length - 1);
      const root = Buffer.from(anchor);
      root.writeUInt8(root.readUInt8(40) ^ 1, 40);
      for (const value of [forged, root, anchor.subarray(0, -1), Buffer.alloc(0), Buffer.from('nonsense')]) {
        fixture.tamper((db) => db.putSync('anchor', value, 5));
        await assert.rejects(fixture.reopen(), refusal('store-corrupt', /anchor/));
      }
    });

    it('I-9 an anchor of a newer format is refused by name', async () => {
      await fill();
      const statement = encode('AnchorStatement', {
        format: 2,
        storeId: fixture.storeId,
        root: Buffer.alloc(32),
        counter: 0n,
        auditHead: Buffer.alloc(0),
        auditLength: 0n,
        resets: 0,
        isUnclean: false,
      });
      const mac = createHmac('sha256', fixture.anchor.keys.current.anchorKey).update(statement).digest();
      fixture.tamper((db) => db.putSync('anchor', encode('AnchorRecord', { statement, mac, keyId: 1 }), 5));
      await assert.rejects(fixture.reopen(), refusal('newer-format'));
    });

    it('I-9 a store is anchored once: not again, and not over records', async () => {
      await fill();
      await assert.rejects(
        createAnchoredStore(await fixture.open(), fixture.anchor),
        refusal('already-initialised'),
      );
    });

    it('I-9 a store whose set-up did not finish is missing, not empty', async () => {
      await (await fixture.open(true)).close();
      await assert.rejects(fixture.reopen(), refusal('store-missing'));
    });
  });

  describe('changed while it runs', () => {
    let anchored: AnchoredStore;
    beforeEach(async () => {
      anchored = await fixture.create();
      await anchored.write('k/0', 0, contentOf('k/0', 1));
      await anchored.write('k/0', 1, contentOf('k/0', 2));
      await anchored.write('k/1', 0, contentOf('k/1', 1));
    });

    const changes: [string, (db: Lmdb) => void][] = [
      ['an old record put back', (db) => db.putSync('k/0', contentOf('k/0', 1), 1)],
      ['old content under the new version', (db) => db.putSync('k/0', contentOf('k/0', 1), 2)],
      ['a record removed', (db) => db.removeSync('k/0')],
    ];
    for (const [what, change] of changes) {
      it(`I-5 ${what} is refused when it is read, by its name, and all that follows`, async () => {
        fixture.tamper(change);
        await assert.rejects(anchored.read('k/0'), refusal('store-corrupt', /k\/0/));
        await assert.rejects(anchored.read('k/1'), refusal('store-corrupt'));
        await assert.rejects(anchored.write('k/1', 1, Buffer.from('x')), refusal('store-corrupt'));
      });
    }

    it('I-5 a record that was never written is refused when it is read', async () => {
      fixture.tamper((db) => db.putSync('k/2', Buffer.from('x'), 1));
      await assert.rejects(anchored.read('k/2'), refusal('store-corrupt', /k\/2/));
    });

    const behind: [string, (db: Lmdb) => void][] = [
      ['the record', (db) => db.putSync('k/0', contentOf('k/0', 1), 1)],
      ['the anchor', (db) => db.putSync('anchor', db.getEntry('anchor')!.value, 9)],
    ];
    for (const [what, change] of behind) {
      it(`I-5 a write meets another version of ${what}: nothing is written, now or later`, async () => {
        fixture.tamper(change);
        const results = await Promise.allSettled([
          anchored.write('k/0', 2, Buffer.from('x')),
          anchored.write('k/2', 0, Buffer.from('y')),
        ]);
        for (const result of results) {
          assert.equal(result.status, 'rejected');
          refusal('store-corrupt', /while the manager was running/)(result.reason);
        }
        await assert.rejects(anchored.write('k/3', 0, Buffer.from('z')), refusal('store-corrupt'));
        await assert.rejects(anchored.read('k/1'), refusal('store-corrupt'));
        await anchored.close();
        const store = await fixture.open();
        assert.equal(await store.get('k/2'), undefined);
        await store.close();
      });
    }
  });

  it('I-5 a whole older copy of the files is refused once the TPM has counted what came after', async () => {
    const anchored = await fixture.create();
    await anchored.write('k', 0, contentOf('k', 1));
    await anchored.close();
    copyFileSync(fixture.dataFile, `${fixture.parent}/old`);
    const again = await fixture.reopen();
    await again.write('k', 1, contentOf('k', 2));
    await again.close();
    copyFileSync(fixture.dataFile, `${fixture.parent}/new`);
    copyFileSync(`${fixture.parent}/old`, fixture.dataFile);
    await assert.rejects(fixture.reopen(), refusal('rollback-detected', /old one: its anchor says 2.*to 3/));
    copyFileSync(`${fixture.parent}/new`, fixture.dataFile);
    assert.equal((await (await fixture.reopen()).read('k'))?.version, 2);
  });

  it('leaves the keys to their owner', async () => {
    const anchored = await fixture.create();
    const { anchorKey } = fixture.anchor.keys.current;
    const before = Buffer.from(anchorKey);
    await anchored.close();
    assert.deepEqual(anchorKey, before);
    const store = await fixture.open();
    assert.equal((await openAnchoredStore(store, fixture.anchor)).size, 0);
  });
});

/** One turn of the event loop, with all its promises. */
function turn(): Promise<void> {
  return new Promise((resolve) => setImmediate(resolve));
}
