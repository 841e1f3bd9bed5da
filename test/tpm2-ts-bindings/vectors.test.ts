import assert from 'node:assert/strict';
import { createPrivateKey, type KeyObject } from 'node:crypto';
import {
  ObjectAttribute as A,
  Alg,
  Curve,
  decapsulate,
  decode,
  embed,
  type HashInfo,
  hashInfo,
  kdfa,
  kdfe,
  NvAttribute as N,
  NV_Write,
  nameOf,
  type Public,
  publicArea,
  ReadPublic,
  readNvIndex,
  rsaSrkTemplate,
  srkTemplate,
  type Tpm,
  TpmError,
  tpmsNvPublic,
  tpmtPublic,
  tpmtSensitive,
  withPassword,
} from 'tpm2-ts-bindings';
import { cfb } from 'tpm2-ts-bindings/internal/crypto';
import { isA } from '../support/is-a.js';
import { NOTHING, withPrimary, withSuiteTpm } from '../support/tpm-fixture.js';
import { OWNER, withNv } from './make.js';
import { CFB, CFB_IV, CFB_PLAIN, hex, KDFA, KDFE, KEM } from './vectors.js';

function hash(alg: number): HashInfo {
  const found = hashInfo(alg);
  assert.ok(found);
  return found;
}

/** The private part of a vector's key as node:crypto takes it. */
function privateKeyOf(key: Public, bytes: Buffer): KeyObject {
  const { sensitive } = decode(tpmtSensitive, bytes);
  if (key.type === Alg.ECC) {
    const parts = { d: sensitive, ...key.unique };
    const jwk = Object.fromEntries(
      Object.entries(parts).map(([name, part]) => [name, part.toString('base64url')]),
    );
    return createPrivateKey({ key: { kty: 'EC', crv: 'P-256', ...jwk }, format: 'jwk' });
  }
  assert.ok(key.type === Alg.RSA);
  const number = (part: Buffer): bigint => BigInt(`0x${part.toString('hex')}`);
  const text = (value: bigint): string =>
    Buffer.from(value.toString(16).padStart(512, '0'), 'hex').toString('base64url');
  const [n, e, p] = [number(key.unique), 65537n, number(sensitive)];
  const q = n / p;
  const d = inverse(e, (p - 1n) * (q - 1n));
  const parts = { n, e, d, p, q, dp: d % (p - 1n), dq: d % (q - 1n), qi: inverse(q, p) };
  const jwk = Object.fromEntries(Object.entries(parts).map(([name, value]) => [name, text(value)]));
  return createPrivateKey({ key: { kty: 'RSA', ...jwk }, format: 'jwk' });
}

/** Of `value` modulo `modulus`, by Euclid's algorithm. */
function inverse(value: bigint, modulus: bigint): bigint {
  let [old, rest, x, next] = [value % modulus, modulus, 1n, 0n];
  while (rest !== 0n) {
    const times = old / rest;
    [old, rest, x, next] = [rest, old - times * rest, next, x - times * next];
  }
  return ((x % modulus) + modulus) % modulus;
}

describe('tpm2-ts-bindings: published vectors', () => {
  for (const { name, alg, key, label, u, v, bits, result } of KDFA) {
    it(`KDFa ${name}`, () => {
      assert.equal(
        kdfa(hash(alg), hex(key), label, hex(u), hex(v), bits).toString('hex'),
        hex(result).toString('hex'),
      );
    });
  }

  for (const { name, alg, key, label, u, v, bits, result } of KDFE) {
    it(`KDFe ${name}`, () => {
      assert.equal(
        kdfe(hash(alg), hex(key), label, hex(u), hex(v), bits).toString('hex'),
        hex(result).toString('hex'),
      );
    });
  }

  for (const { name, key, cipher } of CFB) {
    it(name, () => {
      // Whole blocks, and one that is cut in its last block: a parameter has any length.
      for (const length of [64, 51]) {
        const [plain, encrypted] = [CFB_PLAIN.subarray(0, length), hex(cipher).subarray(0, length)];
        assert.deepEqual(cfb('encrypt', hex(key), CFB_IV, plain), encrypted);
        assert.deepEqual(cfb('decrypt', hex(key), CFB_IV, encrypted), plain);
      }
    });
  }

  for (const vector of KEM) {
    it(`encapsulated secret ${vector.name}`, () => {
      const key = decode(tpmtPublic, hex(vector.key));
      const open = (label: string): string =>
        decapsulate(key, privateKeyOf(key, hex(vector.privateKey)), label, hex(vector.ciphertext)).toString(
          'hex',
        );
      assert.equal(open(vector.label), vector.secret);
      // The label is part of it: with another one an ECC key gives another secret, an RSA key none.
      if (key.type === Alg.ECC) assert.notEqual(open('OTHER'), vector.secret);
      else
        assert.throws(
          () => open('OTHER'),
          (error) => isA(error, TpmError),
        );
    });
  }
});

describe('tpm2-ts-bindings: Names, which swtpm computes too', () => {
  let tpm: Tpm;
  withSuiteTpm((made) => {
    tpm = made;
  });

  const HASHES = [Alg.SHA1, Alg.SHA256, Alg.SHA384, Alg.SHA512];
  const keyedHash: Public = {
    type: Alg.KEYEDHASH,
    nameAlg: Alg.SHA256,
    objectAttributes: A.fixedTPM | A.fixedParent | A.sensitiveDataOrigin | A.userWithAuth | A.sign,
    authPolicy: NOTHING,
    parameters: { scheme: { scheme: Alg.HMAC, hashAlg: Alg.SHA256 } },
    unique: NOTHING,
  };
  const symmetric: Public = {
    type: Alg.SYMCIPHER,
    nameAlg: Alg.SHA256,
    objectAttributes: A.fixedTPM | A.fixedParent | A.sensitiveDataOrigin | A.userWithAuth | A.decrypt,
    authPolicy: NOTHING,
    parameters: { sym: { algorithm: Alg.AES, keyBits: 256, mode: Alg.CFB } },
    unique: NOTHING,
  };
  const p384 = srkTemplate().value;
  assert.ok(p384.type === Alg.ECC);
  const KEYS: readonly (readonly [string, Public])[] = [
    ['ECC P-256', srkTemplate().value],
    ['ECC P-384', { ...p384, parameters: { ...p384.parameters, curveID: Curve.NIST_P384 } }],
    ['RSA', rsaSrkTemplate().value],
    ['keyed hash', keyedHash],
    ['symmetric', symmetric],
  ];
  for (const [kind, template] of KEYS) {
    it(`of objects: ${kind}`, async () => {
      // One is enough for RSA, where making a key takes long.
      for (const nameAlg of kind === 'RSA' ? [Alg.SHA384] : HASHES) {
        await withPrimary(tpm, publicArea({ ...template, nameAlg }), async (key) => {
          const { outPublic, name } = await tpm.run(ReadPublic, { objectHandle: key }, {});
          assert.deepEqual(nameOf(nameAlg, outPublic.bytes), name);
          assert.equal(outPublic.value.nameAlg, nameAlg);
          assert.deepEqual(
            publicArea(outPublic.value).bytes,
            outPublic.bytes,
            'what was read is written the same',
          );
        });
      }
    });
  }

  it('of NV indices, before and after the first write', async () => {
    await withNv(
      tpm,
      { attributes: N.OWNERWRITE | N.OWNERREAD | N.NO_DA, size: 8 },
      async (index, current) => {
        const read = await readNvIndex(tpm, index.handle);
        assert.deepEqual(read?.name, index.name);
        assert.deepEqual(embed(tpmsNvPublic, index.nvPublic.value).bytes, read?.nvPublic.bytes);
        await tpm.run(
          NV_Write,
          { authHandle: withPassword(OWNER), nvIndex: index },
          { data: Buffer.alloc(8), offset: 0 },
        );
        assert.notDeepEqual((await current()).name, index.name);
      },
    );
  });
});
