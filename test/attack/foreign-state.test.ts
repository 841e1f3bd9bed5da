import assert from 'node:assert/strict';
import { decodeRecord, encodeRecord, openState } from 'vtpm-manager/records/index';
import { decode, encode, type StoredRecord } from 'vtpm-proto';
import { refusal } from '../manager/store-fixture.js';
import { testKeys } from '../support/test-keys.js';
import type { TestVtpm } from '../support/worker-client.js';
import { savedRecord } from './saved-record.js';
import { keyOf, refusedBecause, Target } from './target.js';

/** Each belt alone: what would be left to stop it, were the one before it broken. */
describe('attack: the state of one vTPM is given out as that of another', () => {
  const keys = testKeys();
  const [a, b] = [savedRecord(keys), savedRecord(keys)];
  const stored = (bytes: Uint8Array): StoredRecord => decode('StoredRecord', bytes);

  it('I-2 I-5 its record, under the uuid of the other', () => {
    assert.throws(
      () => decodeRecord(keys, b.vtpm.uuid, a.bytes),
      refusal(
        'store-corrupt',
        new RegExp(`${b.vtpm.id} does not authenticate: it was changed, or belongs to another`),
      ),
    );
  });

  it('I-2 I-5 its sealed parts, its header or its mac, in the record of the other', () => {
    for (const field of ['parts', 'header', 'mac'] as const) {
      const mixed = encode('StoredRecord', { ...stored(b.bytes), [field]: stored(a.bytes)[field] });
      assert.throws(
        () => decodeRecord(keys, b.vtpm.uuid, mixed),
        refusal('store-corrupt', /does not authenticate/),
        field,
      );
    }
  });

  it('I-2 I-5 its sealed parts, or its data key, in a record that authenticates', () => {
    const [from, into] = [decodeRecord(keys, a.vtpm.uuid, a.bytes), decodeRecord(keys, b.vtpm.uuid, b.bytes)];
    const opened = (record: typeof into) =>
      openState(keys, decodeRecord(keys, b.vtpm.uuid, encodeRecord(keys, record)));
    assert.throws(() => opened({ ...into, parts: from.parts }), refusal('store-corrupt'));
    const { wrappedDataKey } = from.header;
    const withKey = { ...into.header, wrappedDataKey };
    assert.throws(() => opened({ ...into, header: withKey }), refusal('store-corrupt'));
    assert.throws(() => opened({ header: withKey, parts: from.parts }), refusal('store-corrupt'));
    assert.deepEqual(opened(into).permanent, b.permanent, 'positive control');
  });

  it('I-2 I-5 while the manager runs: its record in the place of the other, and a worker asks for that', async () => {
    const target = await Target.create();
    try {
      await target.starts();
      const [mine, other] = [await target.vtpm('mine'), await target.vtpm('other')] as [TestVtpm, TestVtpm];
      const { version } = target.record(keyOf(mine));
      const { value } = target.record(keyOf(other));
      const control = await target.load(mine, 1n);
      assert.equal(control.permanent, 'mine', 'positive control');
      await control.close();
      target.tamper((db) => db.putSync(keyOf(mine), value, version + 1));
      await assert.rejects(
        target.load(mine, 2n),
        refusedBecause('store-corrupt', new RegExp(`${mine.id} is not what was last written`)),
      );
    } finally {
      await target.destroy();
      await target.tpm?.stop();
    }
  });
});
