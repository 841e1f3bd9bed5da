import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import fc from 'fast-check';
import { ManagerError } from 'vtpm-manager';
import {
  BUNDLE_FORMAT,
  type ExpectedState,
  openBundle,
  type StateParts,
  sealBundle,
} from 'vtpm-manager/migration/bundle';
import { PART_ORDER, StateKeys, sharedSecret } from 'vtpm-manager/migration/state-key';
import { Transcript } from 'vtpm-manager/migration/transcript';
import {
  type BundleHeader,
  boxKeyPair,
  decode,
  encode,
  type PeerMessage,
  type StateBundle,
} from 'vtpm-proto';
import { refused } from './ownership-fixture.js';

const KINDS = PART_ORDER;

function world() {
  const keys = new StateKeys(randomBytes(32), randomBytes(32), randomBytes(32));
  const header: Omit<BundleHeader, 'parts'> = {
    format: BUNDLE_FORMAT,
    migrationId: randomBytes(16),
    identifier: randomBytes(32),
    vtpmUuid: randomBytes(16),
    vmUuid: randomBytes(16),
    vmRunId: randomBytes(16),
    epoch: 7n,
    generation: 40n,
    libtpmsVersion: '0.9.2',
    marks: ['restored'],
    createdAt: 1n,
    savedAt: 2n,
    referenceDigest: randomBytes(32),
    suspendedGeneration: 40n,
    lineage: [],
    auditHead: randomBytes(32),
    auditLength: 9n,
    auditTail: ['{}'],
  };
  const parts: StateParts = {
    PERMANENT: randomBytes(5000),
    VOLATILE: randomBytes(900),
    REFERENCE_KEY: randomBytes(32),
  };
  const expected: ExpectedState = {
    identifier: header.identifier,
    migrationId: header.migrationId,
    vtpmUuid: header.vtpmUuid,
    vmUuid: header.vmUuid,
    epoch: 7n,
    leastGeneration: 38n,
    required: ['PERMANENT'],
    allowed: KINDS,
  };
  return { keys, header, parts, expected };
}

/** The bundle with its list changed, its completeness digest made anew by whoever has the keys. */
function changed(
  { keys, header, parts }: ReturnType<typeof world>,
  change: (bundle: StateBundle) => Partial<StateBundle>,
): Buffer {
  const bundle = decode('StateBundle', sealBundle(keys, header, parts));
  return encode('StateBundle', { ...bundle, ...change(bundle) });
}

describe('the state that travels', () => {
  it('comes out as it went in, whatever parts there are', () => {
    fc.assert(
      fc.property(
        fc.uint8Array({ minLength: 1, maxLength: 3000 }),
        fc.option(fc.uint8Array({ minLength: 1, maxLength: 2000 }), { nil: undefined }),
        fc.boolean(),
        (permanent, volatile, hasReference) => {
          const { keys, header, expected } = world();
          const parts: StateParts = {
            PERMANENT: permanent,
            ...(volatile && { VOLATILE: volatile }),
            ...(hasReference && { REFERENCE_KEY: randomBytes(32) }),
          };
          const opened = openBundle(keys, expected, sealBundle(keys, header, parts));
          assert.deepEqual(Object.keys(opened.parts), Object.keys(parts));
          for (const kind of KINDS) {
            assert.deepEqual(
              opened.parts[kind] && Buffer.from(opened.parts[kind]),
              parts[kind] && Buffer.from(parts[kind]),
            );
          }
          assert.equal(opened.header.generation, header.generation);
        },
      ),
      { numRuns: 50 },
    );
  });

  it('has no byte of the state in the clear', () => {
    const { keys, header, parts } = world();
    const sealed = sealBundle(keys, header, parts);
    for (const part of Object.values(parts))
      assert.equal(sealed.includes(Buffer.from(part.subarray(0, 24))), false);
    // The same search finds what is there.
    assert.equal(sealed.includes(Buffer.from(header.identifier)), true);
  });

  it('is refused with any bit flipped', () => {
    const { keys, header, parts, expected } = world();
    const sealed = sealBundle(keys, header, {
      ...parts,
      PERMANENT: randomBytes(64),
      VOLATILE: randomBytes(32),
    });
    for (let bit = 0; bit < sealed.length * 8; bit += 3) {
      const flipped = Buffer.from(sealed);
      flipped[bit >> 3]! ^= 1 << (bit & 7);
      assert.throws(() => openBundle(keys, expected, flipped), ManagerError, `bit ${bit}`);
    }
    openBundle(keys, expected, sealed);
  });

  const reordered: [string, (bundle: StateBundle) => Partial<StateBundle>, RegExp][] = [
    ['a missing part', ({ parts }) => ({ parts: parts.slice(0, 2) }), /2 parts came, 3 were announced/],
    [
      'a reordered part',
      ({ parts }) => ({ parts: [parts[1]!, parts[0]!, parts[2]!] }),
      /permanent part came behind/,
    ],
    [
      'a doubled part',
      ({ parts }) => ({ parts: [parts[0]!, parts[1]!, parts[1]!] }),
      /volatile part came twice/,
    ],
    [
      'an unknown part',
      ({ parts }) => ({ parts: [parts[0]!, parts[1]!, { ...parts[2]!, kind: 'JOURNAL' }] }),
      /a part "JOURNAL"/,
    ],
    [
      'a cut part',
      ({ parts }) => ({
        parts: [parts[0]!, { ...parts[1]!, sealed: parts[1]!.sealed.subarray(0, 10) }, parts[2]!],
      }),
      /volatile part is cut/,
    ],
    [
      'a reference key of another length',
      ({ parts }) => ({
        parts: [parts[0]!, parts[1]!, { ...parts[2]!, sealed: parts[2]!.sealed.subarray(1) }],
      }),
      /reference key part is cut/,
    ],
    ['a digest of something else', () => ({ completeness: randomBytes(32) }), /completeness digest/],
    [
      'a part under the name of another',
      ({ parts }) => ({ parts: [parts[0]!, { ...parts[0]!, kind: 'VOLATILE' }, parts[2]!] }),
      /completeness digest/,
    ],
  ];
  for (const [what, change, message] of reordered) {
    it(`is refused with ${what}: incomplete`, () => {
      const made = world();
      assert.throws(
        () => openBundle(made.keys, made.expected, changed(made, change)),
        (error) => refused('incomplete')(error) && message.test((error as Error).message),
      );
    });
  }

  it('is refused where a part that must be there is not, though the source says that this is all: incomplete', () => {
    const { keys, header, parts, expected } = world();
    const { VOLATILE: _, ...rest } = parts;
    const sealed = sealBundle(keys, header, rest);
    openBundle(keys, expected, sealed);
    assert.throws(
      () => openBundle(keys, { ...expected, required: ['PERMANENT', 'VOLATILE'] }, sealed),
      refused('incomplete'),
    );
  });

  it('is refused where a part of another session stands in it, its digest made anew: incomplete', () => {
    const mine = world();
    const other = { ...mine, header: { ...mine.header, identifier: randomBytes(32) } };
    const foreign = decode('StateBundle', sealBundle(mine.keys, other.header, mine.parts)).parts[0]!;
    const bundle = decode('StateBundle', sealBundle(mine.keys, mine.header, mine.parts));
    const parts = [foreign, bundle.parts[1]!, bundle.parts[2]!];
    const framed = (bytes: Uint8Array) => {
      const length = Buffer.alloc(4);
      length.writeUInt32BE(bytes.length);
      return Buffer.concat([length, bytes]);
    };
    const completeness = mine.keys.completeness([
      framed(bundle.header),
      ...parts.flatMap(({ kind, nonce, sealed }) => [
        framed(Buffer.from(kind)),
        framed(nonce),
        framed(sealed),
      ]),
    ]);
    const bytes = encode('StateBundle', { ...bundle, parts, completeness });
    assert.throws(
      () => openBundle(mine.keys, mine.expected, bytes),
      (error) =>
        refused('incomplete')(error) && /permanent part does not authenticate/.test((error as Error).message),
    );
  });

  const others: [string, Partial<BundleHeader>, Parameters<typeof refused>[0]][] = [
    ["another session's identifier", { identifier: randomBytes(32) }, 'wrong-identifier'],
    ["another migration's id", { migrationId: randomBytes(16) }, 'wrong-identifier'],
    ['another vTPM', { vtpmUuid: randomBytes(16) }, 'wrong-vm'],
    ['another VM', { vmUuid: randomBytes(16) }, 'wrong-vm'],
    ['another epoch', { epoch: 8n }, 'stale-epoch'],
    ['a generation from before', { generation: 37n }, 'rollback-detected'],
    ['a newer format', { format: 2 }, 'newer-format'],
    ['a VM run id of the wrong length', { vmRunId: randomBytes(15) }, 'bad-request'],
    ['marks without end', { marks: Array.from({ length: 33 }, () => 'm') }, 'too-large'],
  ];
  for (const [what, change, code] of others) {
    it(`is refused with ${what}: ${code}`, () => {
      const { keys, header, parts, expected } = world();
      const sealed = sealBundle(keys, { ...header, ...change }, parts);
      assert.throws(() => openBundle(keys, expected, sealed), refused(code));
    });
  }

  it('is refused where it is larger than any: too-large', () => {
    const { keys, header, parts, expected } = world();
    const sealed = sealBundle(keys, header, { ...parts, VOLATILE: randomBytes(64 * 1024 + 1) });
    assert.throws(() => openBundle(keys, expected, sealed), refused('too-large'));
  });

  it('is refused under the keys of another session: incomplete', () => {
    const { keys: _, header, parts, expected } = world();
    const sealed = sealBundle(world().keys, header, parts);
    assert.throws(() => openBundle(world().keys, expected, sealed), refused('incomplete'));
  });
});

describe('the state key', () => {
  it('needs the unwrapped secret, the session secret and the transcript, each of them', () => {
    const [secret, shared, transcript] = [randomBytes(32), randomBytes(32), randomBytes(32)];
    const proof = new StateKeys(secret, shared, transcript).confirmation(transcript);
    assert.equal(new StateKeys(secret, shared, transcript).confirms(proof, transcript), true);
    assert.equal(new StateKeys(randomBytes(32), shared, transcript).confirms(proof, transcript), false);
    assert.equal(new StateKeys(secret, randomBytes(32), transcript).confirms(proof, transcript), false);
    assert.equal(new StateKeys(secret, shared, randomBytes(32)).confirms(proof, transcript), false);
    assert.equal(new StateKeys(secret, shared, transcript).confirms(proof, randomBytes(32)), false);
    for (const [a, b] of [
      [Buffer.alloc(0), shared],
      [secret, Buffer.alloc(0)],
      [Buffer.concat([secret, shared]), Buffer.alloc(0)],
    ] as const) {
      assert.throws(() => new StateKeys(a, b, transcript), /bytes, not 32/);
    }
  });

  it('is another one for each kind of part, and of no use once it is wiped', () => {
    const keys = new StateKeys(randomBytes(32), randomBytes(32), randomBytes(32));
    const all = [
      ...KINDS.map((kind) => keys.part(kind)),
      keys.completeness([]),
      keys.confirmation(Buffer.alloc(32)),
    ];
    assert.equal(new Set(all.map((key) => key.toString('hex'))).size, all.length);
    const before = keys.part('PERMANENT');
    keys.wipe();
    assert.notDeepEqual(keys.part('PERMANENT'), before);
  });

  it('comes of two session keys alike at both ends, and of no key of small order', () => {
    const [a, b] = [boxKeyPair(), boxKeyPair()];
    assert.deepEqual(sharedSecret(a, b.publicKey), sharedSecret(b, a.publicKey));
    assert.throws(() => sharedSecret(a, Buffer.alloc(32)), refused('bad-request'));
    assert.throws(() => sharedSecret(a, Buffer.alloc(31)), refused('bad-request'));
  });
});

describe('the transcript', () => {
  const message = fc.record({
    type: fc.constantFrom<PeerMessage['type']>('HELLO', 'OFFER', 'EVIDENCE', 'SECRET', 'READY'),
    payload: fc.uint8Array({ maxLength: 40 }),
  });

  it('is the same for the same messages on the same channel, and for no others', () => {
    fc.assert(
      fc.property(fc.array(message, { maxLength: 6 }), fc.array(message, { maxLength: 6 }), (one, other) => {
        const binding = Buffer.alloc(32, 1);
        const of = (messages: PeerMessage[], bound = binding): string => {
          const transcript = new Transcript(bound);
          for (const each of messages) transcript.add(each);
          return transcript.digest.toString('hex');
        };
        const isSame = JSON.stringify(one) === JSON.stringify(other);
        assert.equal(of(one) === of(other), isSame);
        assert.equal(of(one), of([...one]));
        assert.notEqual(of(one), of(one, Buffer.alloc(32, 2)));
      }),
    );
  });
});
