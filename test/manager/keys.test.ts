import assert from 'node:assert/strict';
import { createCipheriv, hkdfSync } from 'node:crypto';
import fc from 'fast-check';
import { ManagerError } from 'vtpm-manager';
import {
  deriveRootKeys,
  type ExpectedContext,
  KeyHierarchy,
  newDataKey,
  newInstallationSecrets,
  openInstallationSecrets,
  openPart,
  sealInstallationSecrets,
  sealPart,
  unwrapDataKey,
  wipe,
  wrapDataKey,
} from 'vtpm-manager/keys/index';
import { hkdf } from 'vtpm-manager/keys/secret';
import { decode, encode, type PartContext } from 'vtpm-proto';
import { isA } from '../support/is-a.js';

const filled = (length: number, byte: number): Buffer => Buffer.alloc(length, byte);
const ROOT = Buffer.from(Array.from({ length: 32 }, (_, i) => i));
const STORE_ID = filled(16, 0xa1);

const context: Omit<PartContext, 'length'> = {
  format: 1,
  kind: 'VOLATILE',
  keyId: 1,
  storeId: STORE_ID,
  vtpmUuid: filled(16, 2),
  vmUuid: filled(16, 3),
  vmRunId: filled(16, 4),
  generation: 5n,
  epoch: 6n,
  libtpmsVersion: '0.9.2',
};
const expected: ExpectedContext = context;

const corrupt = (error: unknown): boolean => isA(error, ManagerError) && error.code === 'store-corrupt';

/** Takes the secrets that the vectors were computed with. */
function knownKeys(storeId = STORE_ID): KeyHierarchy {
  const identity = Buffer.from(VECTORS.identitySecret, 'hex');
  return new KeyHierarchy(deriveRootKeys(ROOT, storeId, 1), { identity, session: ROOT, anchor: ROOT });
}

describe('key hierarchy', () => {
  it('derives the known keys of a known root key', () => {
    const keys = knownKeys();
    // From RFC 5869 as python3 hmac computes it; a change here makes every store unreadable.
    assert.equal(keys.current.storeKey.toString('hex'), VECTORS.storeKey);
    assert.equal(keys.current.recordMacKey.toString('hex'), VECTORS.recordMac);
    assert.equal(keys.current.trustMacKey.toString('hex'), VECTORS.trustMac);
    assert.equal(keys.current.anchorKey.toString('hex'), VECTORS.anchor);
    assert.equal(keys.current.enrolmentMacKey.toString('hex'), VECTORS.enrolmentMac);
    assert.equal(Buffer.from(keys.identity.secretKey).toString('hex'), VECTORS.identitySecret);
    const session = keys.sessionKey({
      sessionId: filled(16, 7),
      vtpmUuid: filled(16, 2),
      epoch: 6n,
      workerKey: filled(32, 8),
    });
    assert.equal(session.toString('hex'), VECTORS.session);
  });

  it('derives as HKDF-SHA256 of RFC 5869 does', () => {
    const input = fc.uint8Array({ maxLength: 100 });
    fc.assert(
      fc.property(fc.uint8Array({ minLength: 1, maxLength: 100 }), input, input, (key, salt, info) => {
        assert.deepEqual(hkdf(key, salt, info), Buffer.from(hkdfSync('sha256', key, salt, info, 32)));
      }),
    );
  });

  it('gives each purpose, store and session another key', () => {
    const a = knownKeys();
    const b = knownKeys(filled(16, 0xa2));
    const names = { sessionId: filled(16, 7), vtpmUuid: filled(16, 2), epoch: 6n, workerKey: filled(32, 8) };
    const all = [
      ...[a, b].flatMap(({ current: { enrolmentMacKey: _, ...ofStore }, anchorAuth }) => [
        ...Object.values(ofStore).filter((value) => Buffer.isBuffer(value) && value.length === 32),
        anchorAuth,
      ]),
      a.current.enrolmentMacKey,
      Buffer.from(a.identity.secretKey),
      a.sessionKey(names),
      b.sessionKey(names),
      a.sessionKey({ ...names, sessionId: filled(16, 9) }),
      a.sessionKey({ ...names, vtpmUuid: filled(16, 9) }),
      a.sessionKey({ ...names, epoch: 7n }),
      a.sessionKey({ ...names, workerKey: filled(32, 9) }),
    ].map((key) => (key as Buffer).toString('hex'));
    assert.equal(all.length, 22);
    assert.equal(new Set(all).size, all.length);
  });

  it('keeps its keys outside the shared pool, and wipes them', () => {
    const keys = knownKeys();
    const { storeKey, recordMacKey, trustMacKey, anchorKey, auditKey, enrolmentMacKey, keyringKey } =
      keys.current;
    const held = [storeKey, recordMacKey, trustMacKey, anchorKey, auditKey, enrolmentMacKey, keyringKey];
    for (const key of [...held, keys.anchorAuth]) assert.equal(key.buffer.byteLength, 32);
    keys.wipe();
    for (const key of [...held, keys.anchorAuth, keys.identity.secretKey])
      assert.ok(key.every((byte) => byte === 0));
    const dataKey = newDataKey();
    assert.equal(dataKey.buffer.byteLength, 32);
    assert.ok(dataKey.some((byte) => byte !== 0));
    wipe(dataKey);
    assert.ok(dataKey.every((byte) => byte === 0));
  });

  it('has two generations while it is rotated, and one before and after', () => {
    const keys = knownKeys();
    const old = keys.current;
    keys.advance(deriveRootKeys(filled(32, 9), STORE_ID, 2));
    assert.equal(keys.ofGeneration(1, 'x'), old);
    assert.equal(keys.ofGeneration(2, 'x'), keys.current);
    keys.forgetOlder();
    assert.ok(old.storeKey.every((byte) => byte === 0));
    assert.throws(() => keys.ofGeneration(1, 'x'), /rotation/);
    assert.throws(() => keys.ofGeneration(3, 'x'), corrupt);
  });

  it('seals the secrets of the installation for one store and generation', () => {
    const secrets = newInstallationSecrets();
    const keys = deriveRootKeys(ROOT, STORE_ID, 1);
    const sealed = sealInstallationSecrets(keys, secrets);
    assert.deepEqual(openInstallationSecrets(keys, sealed), secrets);
    for (const part of Object.values(secrets)) assert.equal(sealed.includes(part), false);
    for (const other of [
      deriveRootKeys(ROOT, STORE_ID, 2),
      deriveRootKeys(ROOT, filled(16, 1), 1),
      deriveRootKeys(filled(32, 1), STORE_ID, 1),
    ]) {
      assert.throws(() => openInstallationSecrets(other, sealed), corrupt);
    }
    assert.throws(() => openInstallationSecrets(keys, sealed.subarray(1)), corrupt);
  });
});

describe('data keys', () => {
  const names = { format: 1, keyId: 1, storeId: STORE_ID, vtpmUuid: filled(16, 2) };
  const storeKey = filled(32, 1);

  it('opens the known wrapped key', () => {
    const aad = Buffer.concat([
      Buffer.from('vtpm.v1 data key'),
      Buffer.from('0000000100000001', 'hex'),
      names.storeId,
      names.vtpmUuid,
    ]);
    const cipher = createCipheriv('aes-256-gcm', storeKey, filled(12, 9));
    cipher.setAAD(aad);
    const body = Buffer.concat([cipher.update(filled(32, 0x5c)), cipher.final()]);
    const wrapped = Buffer.concat([filled(12, 9), body, cipher.getAuthTag()]);
    assert.deepEqual(unwrapDataKey(storeKey, wrapped, names), filled(32, 0x5c));
  });

  it('opens for its own names only', () => {
    const dataKey = newDataKey();
    const wrapped = wrapDataKey(storeKey, dataKey, names);
    assert.deepEqual(unwrapDataKey(storeKey, wrapped, names), dataKey);
    for (const other of [
      { ...names, format: 2 },
      { ...names, keyId: 2 },
      { ...names, storeId: filled(16, 9) },
      { ...names, vtpmUuid: filled(16, 9) },
    ]) {
      assert.throws(() => unwrapDataKey(storeKey, wrapped, other), corrupt);
    }
    assert.throws(() => unwrapDataKey(filled(32, 2), wrapped, names), corrupt);
    assert.throws(() => unwrapDataKey(storeKey, wrapped.subarray(1), names), corrupt);
  });

  it('refuses any flipped bit', () => {
    const wrapped = wrapDataKey(storeKey, newDataKey(), names);
    fc.assert(
      fc.property(fc.nat(wrapped.length * 8 - 1), (bit) => {
        assert.throws(() => unwrapDataKey(storeKey, flip(wrapped, bit), names), corrupt);
      }),
    );
  });
});

describe('parts', () => {
  const dataKey = filled(32, 0x11);

  it('opens the known part', () => {
    const plain = Buffer.from('permanent state');
    const bytes = encode('PartContext', { ...context, length: BigInt(plain.length) });
    const salt = filled(32, 0x77);
    const key = Buffer.from(hkdfSync('sha256', dataKey, salt, 'vtpm.v1 part VOLATILE', 32));
    const cipher = createCipheriv('aes-256-gcm', key, filled(12, 1));
    cipher.setAAD(bytes);
    const sealed = Buffer.concat([cipher.update(plain), cipher.final(), cipher.getAuthTag()]);
    const part = { context: bytes, salt, nonce: filled(12, 1), sealed };
    assert.deepEqual(openPart(dataKey, part, expected), plain);
  });

  it('opens what was sealed, each time under another salt', () => {
    fc.assert(
      fc.property(fc.uint8Array({ maxLength: 2000 }), (plain) => {
        const part = sealPart(dataKey, context, plain);
        assert.notDeepEqual(part.salt, sealPart(dataKey, context, plain).salt);
        assert.deepEqual(openPart(dataKey, part, expected), Buffer.from(plain));
        assert.ok(plain.length < 16 || !Buffer.from(part.sealed).includes(Buffer.from(plain)));
      }),
    );
  });

  it('refuses any flipped bit of context, salt, nonce, ciphertext and tag', () => {
    const part = sealPart(dataKey, context, filled(100, 0x42));
    const field = fc.constantFrom('context', 'salt', 'nonce', 'sealed');
    fc.assert(
      fc.property(field, fc.nat(), (name, at) => {
        const bytes = part[name as keyof typeof part];
        const changed = { ...part, [name]: flip(bytes, at % (bytes.length * 8)) };
        assert.throws(() => openPart(dataKey, changed, expected));
      }),
      { numRuns: 500 },
    );
  });

  it('refuses another data key, and a part that its record does not expect', () => {
    const part = sealPart(dataKey, context, filled(10, 1));
    assert.deepEqual(openPart(dataKey, part, expected), filled(10, 1));
    assert.throws(() => openPart(filled(32, 0x12), part, expected), corrupt);
    const others: Partial<ExpectedContext>[] = [
      { format: 2 },
      { kind: 'PERMANENT' },
      { keyId: 2 },
      { storeId: filled(16, 9) },
      { vtpmUuid: filled(16, 9) },
      { vmUuid: filled(16, 9) },
      { vmRunId: filled(16, 9) },
      { generation: 4n },
      { epoch: 5n },
    ];
    for (const other of others) {
      assert.throws(() => openPart(dataKey, part, { ...expected, ...other }), corrupt, Object.keys(other)[0]);
    }
    // Older content of the same vTPM is still its own.
    assert.deepEqual(openPart(dataKey, part, { ...expected, generation: 9n, epoch: 9n }), filled(10, 1));
  });

  it('refuses any other value of a field of the context, although the reader would accept it', () => {
    const part = sealPart(dataKey, context, filled(10, 1));
    const own = decode('PartContext', part.context);
    const others: Partial<PartContext>[] = [
      { kind: 'PERMANENT' },
      { keyId: 2 },
      { vtpmUuid: filled(16, 9) },
      { vmUuid: filled(16, 9) },
      { vmRunId: filled(16, 9) },
      { storeId: filled(16, 9) },
      { generation: 4n },
      { epoch: 5n },
      { length: 11n },
      { libtpmsVersion: '0.9.3' },
    ];
    for (const other of others) {
      const changed = { ...own, ...other };
      const moved = { ...part, context: encode('PartContext', changed) };
      assert.throws(() => openPart(dataKey, moved, changed), corrupt, Object.keys(other)[0]);
    }
  });
});

function flip(bytes: Uint8Array, bit: number): Buffer {
  const out = Buffer.from(bytes);
  out[bit >> 3] = (out[bit >> 3] ?? 0) ^ (1 << (bit & 7));
  return out;
}

const VECTORS = {
  storeKey: '7cb2d94db1d8c93ffff2686bcb75ad29e3b348b01e4f56ad9f266b4f4276c852',
  recordMac: 'f0c16a2593c237cdcddad0f5c91bad953bedf01a74179b19d87b86f3f9828694',
  trustMac: '4a9a439aa3d2526dc22885ee17339cf9f7bde2084eb26aa0de861455725d9a91',
  anchor: 'b3390f526b3013fbe00449e2e2a3aa6f76990d124d6565b83648be6f1f688ca1',
  enrolmentMac: '66cbfc022262d62f285d49a01469715aec2823be17be0f5d8a0940aa470d02f0',
  identitySecret: 'd418ac80e5f1b9202a0794ba1fd99da7cd00a3d01497583771479459001f81d5',
  session: '4e8d76067849634de091c7df972b96019f8e0f9002cda56f965d8faed5555df4',
};
