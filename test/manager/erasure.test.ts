import assert from 'node:assert/strict';
import { Erasure } from 'vtpm-manager/erasure';
import { createAnchoredStore, openAnchoredStore } from 'vtpm-manager/store/index';
import { MemoryStore, storeFull } from '../support/memory-store.js';
import { anchorOptions, testKeys } from '../support/test-keys.js';
import { refusal } from './store-fixture.js';

describe('what waits for its erasure', () => {
  it('is not forgotten where its note found no room at first, nor by a restart', async () => {
    const disk = new MemoryStore();
    const options = anchorOptions(testKeys());
    const erasure = await Erasure.open(await createAnchoredStore(disk, options));
    disk.beforeCommit = storeFull;
    await assert.rejects(erasure.note(1, 1000), refusal('store-full'));
    assert.equal(erasure.pendingSince(1), undefined);
    disk.beforeCommit = () => undefined;
    await Promise.all([erasure.note(1, 2000), erasure.note(1, 3000)]);
    const again = await Erasure.open(await openAnchoredStore(disk, options));
    assert.equal(again.pendingSince(1), 2000);
    await again.note(2, 4000);
    assert.deepEqual([again.pendingSince(1), again.pendingSince(2)], [undefined, 4000]);
  });
});
