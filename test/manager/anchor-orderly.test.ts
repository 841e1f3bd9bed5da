import assert from 'node:assert/strict';
import { Shutdown, Su } from 'tpm2-ts-bindings';
import type { AnchorCounter, RootTpm, RootTpmEnrolment } from 'vtpm-manager/root-tpm/index';
import { createAnchoredStore, openAnchoredStore, type StoreEntry } from 'vtpm-manager/store/index';
import { MemoryStore } from '../support/memory-store.js';
import { anchorOptions, testKeys } from '../support/test-keys.js';
import { ANCHOR_AUTH, Chip } from './root-tpm-fixture.js';
import { refusal } from './store-fixture.js';

const value = Buffer.from('x');

describe('an anchor whose counter is orderly', () => {
  const chip = new Chip();
  const keys = testKeys();
  let enrolment: RootTpmEnrolment;
  let disk: MemoryStore;

  const options = (counter: AnchorCounter) => ({ ...anchorOptions(keys), counter });
  /** Runs with the counter of the chip as it is now. */
  const on = <T>(body: (counter: AnchorCounter, tpm: RootTpm) => Promise<T>): Promise<T> =>
    chip.root((tpm) => body(tpm.anchorCounter(enrolment, ANCHOR_AUTH), tpm));
  const everything = (): Promise<StoreEntry[]> => disk.list(undefined, 100);
  const open = (entries: StoreEntry[]) =>
    on((counter) => openAnchoredStore(new MemoryStore(entries), options(counter)));

  beforeEach(async () => {
    ({ enrolment } = await chip.enrol({ orderly: true }));
    disk = new MemoryStore();
  });

  it('I-5 after a loss of power the newest disk is taken, as unclean; what it was before that is old afterwards', async () => {
    const before = await on(async (counter) => {
      const store = await createAnchoredStore(disk, options(counter));
      await store.write('event', 0, value, 'now');
      const old = await everything();
      await store.write('event', 1, value, 'now');
      return old;
    });
    const newest = await everything();
    await chip.swtpm.restart();
    await on(async (counter) => {
      const store = await openAnchoredStore(new MemoryStore(newest), options(counter));
      assert.equal(store.isUnclean, true);
      assert.equal((await store.read('event'))?.version, 2);
      // What the service does at once.
      await store.count();
    });
    await assert.rejects(open(newest), refusal('rollback-detected', /old one/));
    await assert.rejects(open(before), refusal('rollback-detected', /old one/));
  });

  it('I-4 I-5 the power may fail again at any step of that start, after which the newest disk is taken, and no other', async () => {
    const other = await on(async (counter) => {
      const store = await createAnchoredStore(disk, options(counter));
      await store.write('event', 0, value, 'now');
      const entries = await everything();
      await store.write('event', 1, value, 'now');
      return entries;
    });
    const block = await on(async (counter) => counter.orderly!.ahead);
    await chip.swtpm.restart();
    // Before and after each end of a block that lies on the way, and at the first and last step.
    const ways = [0n, 1n, block - 1n, block, block + 1n, block + 2n].map((steps) => ({
      steps,
      isCrash: false,
    }));
    for (const { steps, isCrash } of [...ways, { steps: 5n, isCrash: true }]) {
      await assert.rejects(
        on(async (counter) => {
          const { orderly } = counter;
          assert.ok(orderly);
          const countTo = async (end: bigint) => {
            const last = (await counter.read()) + steps;
            await orderly.countTo(last < end ? last : end);
            throw new Error('it ends here');
          };
          await openAnchoredStore(disk, options({ ...counter, orderly: { ...orderly, countTo } }));
        }),
        /it ends here/,
      );
      // The manager alone, the last time.
      if (!isCrash) await chip.swtpm.restart();
    }
    await on(async (counter) => {
      const store = await openAnchoredStore(disk, options(counter));
      assert.equal(store.isUnclean, true);
      assert.equal((await store.read('event'))?.version, 2);
    });
    const unserved = await everything();
    await on(async (counter) => {
      const store = await openAnchoredStore(disk, options(counter));
      assert.equal(store.isUnclean, true, 'until it is written down');
      await store.count();
      await store.write('event', 2, value, 'now');
    });
    for (const old of [other, unserved])
      await assert.rejects(open(old), refusal('rollback-detected', /old one/));
    await on(async (counter) => {
      assert.equal((await openAnchoredStore(disk, options(counter))).isUnclean, false);
    });
  });

  it('I-5 after a reset in order the newest disk is taken, not as unclean, and what was before it is old', async () => {
    const before = await on(async (counter) => {
      const store = await createAnchoredStore(disk, options(counter));
      await store.write('event', 0, value, 'now');
      const entries = await everything();
      await store.write('event', 1, value, 'now');
      return entries;
    });
    const newest = await everything();
    await chip.direct((tpm) => tpm.run(Shutdown, {}, { shutdownType: Su.CLEAR }));
    await chip.swtpm.restart();
    await on(async (counter) => {
      assert.equal((await openAnchoredStore(disk, options(counter))).isUnclean, false);
    });
    for (const old of [before, newest])
      await assert.rejects(open(old), refusal('rollback-detected', /old one/));
  });

  it('I-5 without a loss of power it is as strict as any other', async () => {
    await on(async (counter) => {
      const store = await createAnchoredStore(disk, options(counter));
      const old = await everything();
      await store.write('event', 0, value, 'now');
      await assert.rejects(
        openAnchoredStore(new MemoryStore(old), options(counter)),
        refusal('rollback-detected', /old one/),
      );
      const again = await openAnchoredStore(new MemoryStore(await everything()), options(counter));
      assert.equal(again.isUnclean, false);
    });
  });

  it('I-5 a disk from before the block that was begun is refused after a loss of power too', async () => {
    const old = await on(async (counter) => {
      const store = await createAnchoredStore(disk, options(counter));
      const entries = await everything();
      const { ahead } = counter.orderly!;
      for (let step = 0n; step <= ahead; step++) await counter.increment();
      await store.close();
      return entries;
    });
    await chip.swtpm.restart();
    await assert.rejects(open(old), refusal('rollback-detected', /old one/));
  });
});
