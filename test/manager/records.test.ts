import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import fc from 'fast-check';
import { ManagerError, type ManagerErrorCode } from 'vtpm-manager';
import {
  applyLoad,
  applySave,
  arrive,
  decodeRecord,
  depart,
  encodeRecord,
  type LoadFacts,
  movedAway,
  newRecord,
  openState,
  rekey,
  resume,
  retire,
  settled,
  thawed,
  travelling,
  type VtpmRecord,
} from 'vtpm-manager/records/index';
import { decode, encode, type SaveBody, type StateAction, type StoredRecord } from 'vtpm-proto';
import { isA } from '../support/is-a.js';
import { testKeys } from '../support/test-keys.js';

const keys = testKeys();
const names = { vtpmUuid: randomBytes(16), vmUuid: randomBytes(16) };
const RUN_1 = Buffer.alloc(16, 1);
const RUN_2 = Buffer.alloc(16, 2);

const refused =
  (code: ManagerErrorCode) =>
  (error: unknown): boolean =>
    isA(error, ManagerError) && error.code === code;

function facts(changes: Partial<LoadFacts> = {}): LoadFacts {
  return {
    vmRunId: RUN_1,
    bootId: Buffer.alloc(16, 7),
    session: {
      sessionId: randomBytes(16),
      workerKey: randomBytes(32),
      lastSequence: 0n,
      lastDigest: new Uint8Array(0),
      imageDigest: randomBytes(32),
      isolation: 'sandbox',
      verbs: [],
    },
    libtpmsVersion: '0.9.2',
    keepsVolatile: false,
    ...changes,
  };
}

function saved(record: VtpmRecord, body: Partial<SaveBody>): VtpmRecord {
  const sequence = (record.header.session?.lastSequence ?? 0n) + 1n;
  return applySave(keys, record, {
    body: { libtpmsVersion: '0.9.2', ...body },
    sequence,
    digest: randomBytes(32),
    now: 1000n,
  });
}

const text = (bytes: Uint8Array | undefined): string | undefined =>
  bytes && Buffer.from(bytes).toString('utf8');
const first = newRecord(keys, names, facts(), 500n);
/** What a save brings that suspends the TPM. */
const suspending = (volatile: Uint8Array, digest = Buffer.alloc(32, 9)) => ({
  volatile,
  use: { action: 'SUSPEND' as const, digest },
});
const suspended = saved(first, { permanent: Buffer.from('P1'), ...suspending(Buffer.from('V1')) });

describe('records', () => {
  it('begin at epoch 1, generation 0, without state', () => {
    assert.equal(first.header.epoch, 1n);
    assert.equal(first.header.generation, 0n);
    const { permanent, volatile } = openState(keys, first);
    assert.deepEqual([permanent, volatile], [undefined, undefined]);
  });

  it('come back as they were written, the state not in the clear', () => {
    fc.assert(
      fc.property(
        fc.uint8Array({ minLength: 16, maxLength: 4000 }),
        fc.option(fc.uint8Array({ minLength: 16, maxLength: 1000 }), { nil: undefined }),
        (permanent, volatile) => {
          const record = saved(first, { permanent, ...(volatile && suspending(volatile)) });
          const bytes = encodeRecord(keys, record);
          assert.ok(!bytes.includes(Buffer.from(permanent)));
          const read = decodeRecord(keys, names.vtpmUuid, bytes);
          assert.equal(read.header.generation, 1n);
          const state = openState(keys, read);
          assert.deepEqual(state.permanent, Buffer.from(permanent));
          assert.deepEqual(state.volatile, volatile && Buffer.from(volatile));
        },
      ),
    );
  });

  it('I-3 say with their format that they are about a migration: a manager of before refuses them by name', () => {
    const formatIn = (record: VtpmRecord): number =>
      decodeRecord(keys, names.vtpmUuid, encodeRecord(keys, record)).header.format;
    const destination = {
      migrationId: randomBytes(16),
      destination: randomBytes(32),
      at: 1n,
      mode: 'LIVE' as const,
    };
    const leaving = depart(suspended, destination);
    assert.deepEqual([formatIn(first), formatIn(suspended), formatIn(retire(suspended, 1n))], [1, 1, 1]);
    assert.equal(formatIn(leaving), 2);
    const moved = movedAway(leaving, leaving.header.departure!, 1n);
    assert.equal(formatIn(moved), 2);
    const { departure: _, ...nowhere } = moved.header;
    assert.equal(formatIn({ header: nowhere, parts: [] }), 2);
    assert.equal(formatIn(thawed(leaving)), 1);
    const stay = {
      host: randomBytes(32),
      auditHead: randomBytes(32),
      auditLength: 1n,
      migrationId: randomBytes(16),
    };
    const state = travelling(keys, suspended, stay);
    const source = stay.host;
    const { migrationId } = stay;
    const came = arrive(keys, { vtpmUuid: names.vtpmUuid, migrationId, source }, state, undefined, undefined);
    assert.equal(formatIn(came), 2);
    assert.equal(formatIn(settled(came, migrationId)), 2);
  });

  it('are refused with any bit flipped', () => {
    const bytes = encodeRecord(
      keys,
      saved(first, { permanent: Buffer.from('state'), ...suspending(Buffer.from('v')) }),
    );
    fc.assert(
      fc.property(fc.nat(bytes.length * 8 - 1), (bit) => {
        const changed = Buffer.from(bytes);
        changed[bit >> 3] = (changed[bit >> 3] ?? 0) ^ (1 << (bit & 7));
        assert.throws(
          () => decodeRecord(keys, names.vtpmUuid, changed),
          (error) => refused('store-corrupt')(error) || refused('newer-format')(error),
        );
      }),
      { numRuns: 1000 },
    );
  });

  it('are refused with any byte cut off, and with garbage', () => {
    const bytes = encodeRecord(keys, saved(first, { permanent: Buffer.from('state') }));
    for (let length = 0; length < bytes.length; length++) {
      assert.throws(
        () => decodeRecord(keys, names.vtpmUuid, bytes.subarray(0, length)),
        refused('store-corrupt'),
      );
    }
    fc.assert(
      fc.property(fc.uint8Array({ maxLength: 300 }), (garbage) => {
        assert.throws(
          () => decodeRecord(keys, names.vtpmUuid, garbage),
          (error) => isA(error, ManagerError),
        );
      }),
    );
  });

  it('of another vTPM or another store are refused', () => {
    const bytes = encodeRecord(keys, first);
    decodeRecord(keys, names.vtpmUuid, bytes);
    assert.throws(() => decodeRecord(keys, randomBytes(16), bytes), refused('store-corrupt'));
    const root = randomBytes(32);
    const [a, b] = [testKeys(Buffer.alloc(16, 1), root), testKeys(Buffer.alloc(16, 2), root)];
    const other = encodeRecord(a, newRecord(a, names, facts(), 1n));
    decodeRecord(a, names.vtpmUuid, other);
    assert.throws(() => decodeRecord(b, names.vtpmUuid, other), refused('store-corrupt'));
  });

  it('of a newer format are refused by name before their mac', () => {
    const header = encode('RecordHeader', { ...first.header, format: 300 });
    const bytes = encode('StoredRecord', { header, mac: Buffer.alloc(32), parts: [] });
    assert.throws(() => decodeRecord(keys, names.vtpmUuid, bytes), refused('newer-format'));
    const older = encode('RecordHeader', { ...first.header, format: 0 });
    const old = encode('StoredRecord', { header: older, mac: Buffer.alloc(32), parts: [] });
    assert.throws(() => decodeRecord(keys, names.vtpmUuid, old), refused('store-corrupt'));
  });

  it('do not take a part of an older record of the same vTPM', () => {
    const one = saved(first, { permanent: Buffer.from('one') });
    const two = saved(one, { permanent: Buffer.from('two') });
    const stored = decode('StoredRecord', encodeRecord(keys, two));
    const mixed: StoredRecord = { ...stored, parts: one.parts.map((part) => encode('SealedPart', part)) };
    assert.throws(
      () => decodeRecord(keys, names.vtpmUuid, encode('StoredRecord', mixed)),
      refused('store-corrupt'),
    );
  });
});

describe('saves', () => {
  it('keep the old permanent part where they bring none', () => {
    const one = saved(first, { permanent: Buffer.from('P1') });
    const two = saved(one, {});
    assert.equal(two.header.generation, 2n);
    assert.equal(text(openState(keys, two).permanent), 'P1');
  });

  it('end a suspension, whatever they bring', () => {
    for (const body of [{ permanent: Buffer.from('P2') }, {}]) {
      const next = saved(suspended, body);
      assert.equal(next.header.suspension, undefined);
      assert.equal(openState(keys, next).volatile, undefined);
      assert.equal(next.parts.length, 1);
    }
  });

  it('that suspend again replace what was suspended', () => {
    const digest = Buffer.alloc(32, 8);
    const next = saved(suspended, { permanent: Buffer.from('P2'), ...suspending(Buffer.from('V2'), digest) });
    assert.deepEqual(next.header.suspension, { vmRunId: RUN_1, referenceDigest: digest, generation: 2n });
    assert.equal(text(openState(keys, next).volatile), 'V2');
  });

  it('mark what is exported and imported for ever, once', () => {
    const use = (action: StateAction) => ({
      permanent: Buffer.from('P'),
      use: { action, digest: Buffer.alloc(32) },
    });
    const exported = saved(saved(first, use('EXPORT')), use('EXPORT'));
    assert.deepEqual(exported.header.marks, ['plain-export']);
    assert.deepEqual(saved(exported, use('IMPORT')).header.marks, ['plain-export', 'rolled-back']);
    assert.deepEqual(saved(suspended, use('TAKE_BACK')).header.marks, []);
  });

  it('keep a journal for one save', () => {
    const journal = { sequence: 1n, request: Buffer.from('q'), response: Buffer.from('r') };
    const one = saved(first, { permanent: Buffer.from('P1'), journal });
    assert.equal(one.parts.length, 2);
    assert.equal(saved(one, { permanent: Buffer.from('P2') }).parts.length, 1);
  });

  it('count generations and note session, version and time', () => {
    const one = saved(first, { permanent: Buffer.from('P1'), libtpmsVersion: '0.9.7' });
    assert.equal(one.header.session?.lastSequence, 1n);
    assert.equal(one.header.libtpmsVersion, '0.9.7');
    assert.equal(one.header.savedAt, 1000n);
    assert.equal(one.header.createdAt, 500n);
  });
});

describe('loads', () => {
  it('that resume keep a suspended TPM, over any number of VM runs and keys', () => {
    let next = suspended;
    for (const run of [RUN_1, RUN_2, Buffer.alloc(16, 3)]) {
      next = rekey(keys, applyLoad(keys, next, facts({ vmRunId: run, keepsVolatile: true })));
      const { generation, suspension } = next.header;
      assert.equal(generation, 1n);
      assert.deepEqual(suspension, suspended.header.suspension);
      assert.equal(text(openState(keys, next).volatile), 'V1');
      assert.equal(text(openState(keys, next).permanent), 'P1');
    }
  });

  it('that are cold drop a suspended TPM for good', () => {
    const cold = applyLoad(keys, suspended, facts());
    assert.equal(openState(keys, cold).volatile, undefined);
    assert.equal(cold.header.suspension, undefined);
    const later = applyLoad(keys, cold, facts({ keepsVolatile: true }));
    assert.equal(openState(keys, later).volatile, undefined);
    assert.equal(text(openState(keys, later).permanent), 'P1');
  });
});

describe('the checkpoint key', () => {
  const one = saved(first, { permanent: Buffer.from('P1') });
  const keyOf = (record: VtpmRecord) => openState(keys, record).checkpointKey;

  it('is of one VM run: a load that resumes it keeps the key, any other makes a new one', () => {
    assert.equal(keyOf(first)?.length, 32);
    assert.deepEqual(keyOf(one), keyOf(first));
    assert.deepEqual(keyOf(applyLoad(keys, one, facts({ keepsVolatile: true }))), keyOf(first));
    for (const changes of [{}, { vmRunId: RUN_2 }, { vmRunId: RUN_2, keepsVolatile: true }]) {
      const next = applyLoad(keys, one, facts(changes));
      assert.equal(keyOf(next)?.length, 32);
      assert.notDeepEqual(keyOf(next), keyOf(first));
    }
  });

  it('is read from disk, and no record of before it is refused', () => {
    const read = decodeRecord(keys, names.vtpmUuid, encodeRecord(keys, one));
    assert.deepEqual(keyOf(read), keyOf(one));
    const { checkpointKey: _key, ...header } = one.header;
    const old = decodeRecord(keys, names.vtpmUuid, encodeRecord(keys, { ...one, header }));
    assert.equal(keyOf(old), undefined);
    assert.equal(keyOf(applyLoad(keys, old, facts({ keepsVolatile: true }))), undefined);
    assert.equal(keyOf(applyLoad(keys, old, facts()))?.length, 32);
  });

  it('goes with what it is for: a tombstone and an old state that is accepted have none', () => {
    assert.equal(retire(one, 5n).header.checkpointKey, undefined);
    assert.equal(resume(one, 'rolled-back', 9n).header.checkpointKey, undefined);
  });
});

describe('a suspended TPM', () => {
  it('is not in a tombstone, and not in an old state that is accepted', () => {
    for (const next of [retire(suspended, 5n), resume(suspended, 'rolled-back', 9n)]) {
      assert.equal(next.header.suspension, undefined);
      assert.ok(next.parts.length <= 1);
    }
    assert.equal(openState(keys, resume(suspended, 'rolled-back', 9n)).volatile, undefined);
  });

  it('is not taken for that of another VM run', () => {
    const { suspension } = suspended.header;
    assert.ok(suspension);
    const header = { ...suspended.header, suspension: { ...suspension, vmRunId: RUN_2 } };
    assert.throws(() => openState(keys, { ...suspended, header }), refused('store-corrupt'));
  });
});

describe('retiring', () => {
  it('leaves a tombstone without key or state', () => {
    const one = saved(first, { permanent: Buffer.from('P1') });
    const stone = decodeRecord(keys, names.vtpmUuid, encodeRecord(keys, retire(one, 5n)));
    assert.equal(stone.header.kind, 'RETIRED');
    assert.equal(stone.header.generation, 1n);
    assert.equal(stone.header.wrappedDataKey.length, 0);
    assert.equal(stone.header.session, undefined);
    assert.deepEqual(stone.parts, []);
  });
});
