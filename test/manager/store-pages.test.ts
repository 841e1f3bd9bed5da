import assert from 'node:assert/strict';
import { setImmediate as turn } from 'node:timers/promises';
import { setFlagsFromString } from 'node:v8';
import { runInNewContext } from 'node:vm';
import { pagesOf } from 'vtpm-manager/store/pages';
import type { StateStore, StoreEntry } from 'vtpm-manager/store/state-store';
import { refusal } from './store-fixture.js';

const RECORDS = 5000;
const keyOf = (index: number): string => `vtpm/${String(index).padStart(6, '0')}`;

/** A store that makes its records when it is asked for them, and knows which of them are still in memory. */
class GeneratedStore implements StateStore {
  readonly #values: WeakRef<Buffer>[] = [];
  readonly limits: number[] = [];
  under = 0;
  mostAlive = 0;
  mostUnder = 0;

  async list(after: string | undefined, limit: number): Promise<StoreEntry[]> {
    this.limits.push(limit);
    this.under++;
    this.mostUnder = Math.max(this.mostUnder, this.under);
    await turn();
    collectGarbage();
    this.mostAlive = Math.max(this.mostAlive, this.#values.filter((value) => value.deref()).length);
    const first = after === undefined ? 0 : Number(after.slice(5)) + 1;
    const page = Array.from({ length: Math.max(0, Math.min(limit, RECORDS - first)) }, (_, at) => {
      const value = Buffer.allocUnsafeSlow(64);
      this.#values.push(new WeakRef(value));
      return { key: keyOf(first + at), version: 1, value };
    });
    this.under--;
    return page;
  }

  get = async (): Promise<undefined> => undefined;
  commit = async (): Promise<boolean> => false;
  close = async (): Promise<void> => undefined;
}

setFlagsFromString('--expose-gc');
const collectGarbage = runInNewContext('gc') as () => void;

describe('the pages of a store', () => {
  it('hold every record once, and never more than two of them are in memory', async () => {
    const store = new GeneratedStore();
    const keys: string[] = [];
    for await (const page of pagesOf(store)) {
      keys.push(...page.map(({ key }) => key));
      // The next page comes while this one is looked at.
      await turn();
      await turn();
    }
    assert.deepEqual(
      keys,
      Array.from({ length: RECORDS }, (_, index) => keyOf(index)),
    );
    const [limit = 0] = store.limits;
    assert.ok(RECORDS > 5 * limit, 'positive control: all of them are many pages');
    assert.ok(store.mostAlive <= 2 * limit, `${store.mostAlive} records were in memory`);
    assert.equal(store.mostUnder, 1);
  });

  it('that lead in circles are refused', async () => {
    const store = new GeneratedStore();
    const { list } = store;
    store.list = (after, limit) => list.call(store, after === keyOf(1023) ? undefined : after, limit);
    await assert.rejects(
      async () => {
        for await (const _ of pagesOf(store));
      },
      refusal('store-corrupt', /out of order/),
    );
  });

  it('that cannot be read are an error, also where nobody waits for them yet', async () => {
    const store = new GeneratedStore();
    const { list } = store;
    const failure = new Error('gone');
    store.list = (after, limit) => (after ? Promise.reject(failure) : list.call(store, after, limit));
    for await (const _ of pagesOf(store)) break;
    await turn();
    await assert.rejects(
      async () => {
        for await (const _ of pagesOf(store));
      },
      (error) => error === failure,
    );
  });
});
