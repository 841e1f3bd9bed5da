import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import fc from 'fast-check';
import { startEngine, startupClear } from 'vtpmd';
import type { VtpmdErrorCode } from 'vtpmd/error';
import { BroughtIn } from 'vtpmd/state-blob/brought-in';
import { checkReference, encodeReference, isReference } from 'vtpmd/state-blob/reference';
import type { StateBlobType } from 'vtpmd/state-blob/state-blobs';
import { encodeBlob } from 'vtpmd/state-blob/swtpm-format';
import { refused } from '../support/refused.js';

const key = randomBytes(32);
const names = { managerKey: randomBytes(32), vtpmUuid: randomBytes(16) };
const suspended = { generation: 7n, reference: randomBytes(32) };
const permanent = encodeReference(key, names, 'permanent', suspended);
const volatile = encodeReference(key, names, 'volatile', suspended);

describe('references to a suspended state', () => {
  it('are taken where they are whole and the newest, of this vTPM', () => {
    assert.ok(isReference(permanent));
    checkReference(key, names, 'permanent', suspended, permanent);
    checkReference(key, names, 'volatile', suspended, volatile);
  });

  it('are taken from another manager that had the key of this vTPM: it has moved', () => {
    const here = { ...names, managerKey: randomBytes(32) };
    checkReference(key, here, 'permanent', suspended, permanent);
  });

  const other = (changes: Partial<typeof names>, by = key) =>
    encodeReference(by, { ...names, ...changes }, 'permanent', suspended);
  const later = Buffer.from(permanent);
  later.writeUInt32BE(2, 16);
  const cases: [string, VtpmdErrorCode, Buffer][] = [
    ['another manager', 'reference-foreign', other({ managerKey: randomBytes(32) }, randomBytes(32))],
    ['another vTPM', 'reference-foreign', other({ vtpmUuid: randomBytes(16) })],
    [
      'who has not the key',
      'blob-malformed',
      encodeReference(randomBytes(32), names, 'permanent', suspended),
    ],
    ['the other half', 'blob-malformed', volatile],
    [
      'an older generation',
      'reference-used',
      encodeReference(key, names, 'permanent', { ...suspended, generation: 6n }),
    ],
    [
      'another taking-out of the same generation',
      'reference-used',
      encodeReference(key, names, 'permanent', { ...suspended, reference: randomBytes(32) }),
    ],
    ['a later version', 'newer-format', later],
  ];
  for (const [what, code, blob] of cases) {
    it(`of ${what} are refused by name`, () => {
      assert.throws(() => checkReference(key, names, 'permanent', suspended, blob), refused(code));
    });
  }

  it('are refused where nothing is suspended: the one reference was used', () => {
    assert.throws(
      () => checkReference(key, names, 'permanent', undefined, permanent),
      refused('reference-used'),
    );
  });

  it('are refused with any bit flipped, any byte missing or more', () => {
    const codes = ['blob-malformed', 'reference-foreign', 'newer-format'] as const;
    fc.assert(
      fc.property(fc.nat({ max: (permanent.length - 16) * 8 - 1 }), (bit) => {
        const changed = Buffer.from(permanent);
        const at = 16 + (bit >> 3);
        changed[at] = (changed[at] ?? 0) ^ (1 << (bit & 7));
        assert.throws(() => checkReference(key, names, 'permanent', suspended, changed), refused(...codes));
      }),
    );
    fc.assert(
      fc.property(fc.nat({ max: permanent.length - 1 }), (length) => {
        const short = permanent.subarray(0, length);
        assert.throws(() => checkReference(key, names, 'permanent', suspended, short), refused(...codes));
      }),
    );
    const long = Buffer.concat([permanent, Buffer.alloc(1)]);
    assert.throws(() => checkReference(key, names, 'permanent', suspended, long), refused('blob-malformed'));
  });
});

describe('what a VMM brings in', () => {
  const state = (() => {
    const engine = startEngine({ manufacture: true });
    engine.process(startupClear());
    const snapshot = engine.snapshot();
    engine.terminate();
    return snapshot;
  })();
  const plain = { permanent: encodeBlob(state.permanent), volatile: encodeBlob(state.volatile) };
  /** Where it is noted, over all workers of a test. */
  let note: { broughtIn: number };
  beforeEach(() => {
    note = { broughtIn: 0 };
  });
  const worker = (mayImport = true, isSuspended = true) =>
    new BroughtIn({ names, referenceKey: key, mayImport, note }, isSuspended);
  const reference = (brought: BroughtIn, ...halves: StateBlobType[]): void => {
    for (const type of halves) brought.add(type, type === 'permanent' ? permanent : volatile, suspended);
  };

  it('is nothing where it brings nothing, or only what is empty', () => {
    const brought = worker();
    assert.deepEqual(brought.get(), { kind: 'nothing' });
    brought.add('savestate', Buffer.alloc(0), suspended);
    assert.deepEqual(brought.get(), { kind: 'nothing' });
  });

  it('is a reference where both halves are there, in any order', () => {
    for (const order of [
      ['permanent', 'volatile'],
      ['volatile', 'permanent'],
    ] as const) {
      const brought = worker();
      reference(brought, order[0]);
      assert.throws(() => brought.get(), refused('blob-incomplete'));
      reference(brought, order[1]);
      assert.deepEqual(brought.get(), { kind: 'reference' });
      brought.clear();
      assert.deepEqual(brought.get(), { kind: 'nothing' });
    }
  });

  it('goes on with the next worker, half for half, while the TPM is suspended', () => {
    reference(worker(), 'permanent');
    const second = worker();
    assert.throws(() => second.get(), refused('blob-incomplete'));
    reference(second, 'volatile');
    assert.deepEqual(worker().get(), { kind: 'reference' });
    assert.throws(() => worker(true, false).get(), refused('blob-incomplete'));
  });

  it('in the clear is a state that libtpms reads, with or without volatile state', () => {
    const brought = worker();
    brought.add('permanent', plain.permanent, undefined);
    assert.deepEqual(brought.get(), { kind: 'plain', permanent: state.permanent, volatile: undefined });
    brought.add('volatile', plain.volatile, undefined);
    assert.deepEqual(brought.get(), { kind: 'plain', permanent: state.permanent, volatile: state.volatile });
  });

  it('in the clear is lost with the worker: there is no power-on until it is brought again', () => {
    worker().add('permanent', plain.permanent, undefined);
    const second = worker();
    assert.throws(() => second.get(), refused('blob-incomplete'));
    assert.throws(() => second.add('volatile', plain.volatile, undefined), refused('blob-incomplete'));
    second.clear();
    assert.deepEqual(second.get(), { kind: 'nothing' });
    assert.equal(note.broughtIn, 0);
  });

  const newer = (type: 'permanent' | 'volatile'): Buffer => {
    const changed = Buffer.from(state[type]);
    changed.writeUInt16BE(9, 0);
    changed.writeUInt16BE(9, 6);
    return encodeBlob(changed);
  };
  const refusals: [string, VtpmdErrorCode, [StateBlobType, Buffer][], boolean?][] = [
    ['in the clear without the verb', 'plain-forbidden', [['permanent', plain.permanent]], false],
    ['bytes that are nothing', 'blob-malformed', [['permanent', Buffer.from('nothing like it')]]],
    ['volatile state first', 'blob-incomplete', [['volatile', plain.volatile]]],
    [
      'volatile state of a reference behind a permanent one in the clear',
      'blob-incomplete',
      [
        ['permanent', plain.permanent],
        ['volatile', volatile],
      ],
    ],
    [
      'volatile state in the clear behind a reference',
      'blob-incomplete',
      [
        ['permanent', permanent],
        ['volatile', plain.volatile],
      ],
    ],
    ['permanent state of a newer libtpms', 'newer-format', [['permanent', newer('permanent')]]],
    [
      'volatile state of a newer libtpms',
      'newer-format',
      [
        ['permanent', plain.permanent],
        ['volatile', newer('volatile')],
      ],
    ],
    [
      'a state cut short within',
      'blob-refused',
      [['permanent', encodeBlob(state.permanent.subarray(0, -3))]],
    ],
    ['state of TPM 1.2', 'blob-malformed', [['savestate', plain.permanent]]],
    [
      'a used reference',
      'reference-used',
      [['permanent', encodeReference(key, names, 'permanent', { ...suspended, generation: 1n })]],
    ],
  ];
  for (const [what, code, blobs, mayImport] of refusals) {
    it(`is refused, and so is each power-on after it, also of the next worker: ${what}`, () => {
      const brought = worker(mayImport);
      const last = blobs.length - 1;
      for (const [index, [type, blob]] of blobs.entries()) {
        if (index < last) brought.add(type, blob, suspended);
        else assert.throws(() => brought.add(type, blob, suspended), refused(code));
      }
      assert.throws(() => brought.get(), refused(code));
      assert.throws(() => reference(brought, 'permanent'), refused(code));
      assert.throws(() => worker().get(), refused('blob-incomplete'));
      brought.clear();
      reference(brought, 'permanent', 'volatile');
      assert.deepEqual(brought.get(), { kind: 'reference' });
    });
  }

  it('leaves libtpms as it was: the next TPM is made of what it is given', () => {
    worker().add('permanent', plain.permanent, undefined);
    const engine = startEngine({ manufacture: true });
    try {
      assert.notDeepEqual(engine.snapshot().permanent, state.permanent);
    } finally {
      engine.terminate();
    }
  });
});
