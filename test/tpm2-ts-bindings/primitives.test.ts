import assert from 'node:assert/strict';
import { createCipheriv, createHash, createHmac, randomBytes } from 'node:crypto';
import {
  ObjectAttribute as A,
  Alg,
  Curve,
  ECDH_KeyGen,
  ECDH_ZGen,
  EncryptDecrypt2,
  EventSequenceComplete,
  Hash,
  HashSequenceStart,
  HMAC,
  HMAC_Start,
  inSession,
  type ObjectEntity,
  type Public,
  permanent,
  publicArea,
  Rh,
  RSA_Decrypt,
  RSA_Encrypt,
  SequenceComplete,
  SequenceUpdate,
  St,
  sequenceEntity,
  srkTemplate,
  TestParms,
  type Tpm,
  withPassword,
  withSession,
} from 'tpm2-ts-bindings';
import { NOTHING, withPrimary, withSuiteTpm } from '../support/tpm-fixture.js';
import { create, says, withChild } from './make.js';

const head = {
  nameAlg: Alg.SHA256,
  objectAttributes: A.fixedTPM | A.fixedParent | A.sensitiveDataOrigin | A.userWithAuth | A.noDA,
  authPolicy: NOTHING,
};
const NONE = { algorithm: Alg.NULL } as const;
const NO_SCHEME = { scheme: Alg.NULL } as const;
const ECDH_KEY = {
  type: Alg.ECC,
  ...head,
  objectAttributes: head.objectAttributes | A.decrypt,
  parameters: { symmetric: NONE, scheme: NO_SCHEME, curveID: Curve.NIST_P256, kdf: NO_SCHEME },
  unique: { x: NOTHING, y: NOTHING },
} as const satisfies Public;
const RSA_KEY = {
  type: Alg.RSA,
  ...head,
  objectAttributes: head.objectAttributes | A.decrypt,
  parameters: { symmetric: NONE, scheme: NO_SCHEME, keyBits: 2048, exponent: 0 },
  unique: NOTHING,
} as const satisfies Public;
const HMAC_KEY = {
  type: Alg.KEYEDHASH,
  ...head,
  objectAttributes: (head.objectAttributes & ~A.sensitiveDataOrigin) | A.sign,
  parameters: { scheme: { scheme: Alg.HMAC, hashAlg: Alg.SHA256 } },
  unique: NOTHING,
} as const satisfies Public;
const AES_KEY = {
  type: Alg.SYMCIPHER,
  ...head,
  objectAttributes: (head.objectAttributes & ~A.sensitiveDataOrigin) | A.sign | A.decrypt,
  parameters: { sym: { algorithm: Alg.AES, keyBits: 128, mode: Alg.CFB } },
  unique: NOTHING,
} as const satisfies Public;

describe('tpm2-ts-bindings: primitives', () => {
  let tpm: Tpm;
  withSuiteTpm((made) => {
    tpm = made;
  });

  /** A key with known bytes. */
  const withKey = (template: Public, data: Buffer, body: (key: ObjectEntity) => Promise<void>) =>
    withPrimary(tpm, srkTemplate(), async (srk) =>
      withChild(tpm, srk, await create(tpm, srk, publicArea(template), { data }), body),
    );

  it('ECDH_KeyGen and ECDH_ZGen agree on a point', async () => {
    await withPrimary(tpm, publicArea(ECDH_KEY), async (key) => {
      const { zPoint, pubPoint } = await tpm.run(ECDH_KeyGen, { keyHandle: key }, {});
      const { outPoint } = await tpm.run(ECDH_ZGen, { keyHandle: withPassword(key) }, { inPoint: pubPoint });
      assert.deepEqual(outPoint, zPoint);
      await assert.rejects(
        tpm.run(
          ECDH_ZGen,
          { keyHandle: withPassword(key) },
          { inPoint: { x: pubPoint.x, y: randomBytes(32) } },
        ),
        says('ECC_POINT'),
      );
    });
    await withPrimary(tpm, publicArea(RSA_KEY), (key) =>
      assert.rejects(tpm.run(ECDH_KeyGen, { keyHandle: key }, {}), says('KEY')),
    );
  });

  it('RSA_Encrypt and RSA_Decrypt', async () => {
    const message = randomBytes(60);
    const label = Buffer.from('label\0');
    await withPrimary(tpm, publicArea(RSA_KEY), async (key) => {
      for (const inScheme of [{ scheme: Alg.OAEP, hashAlg: Alg.SHA256 }, { scheme: Alg.RSAES }] as const) {
        const { outData } = await tpm.run(RSA_Encrypt, { keyHandle: key }, { message, inScheme, label });
        const decrypt = (cipherText: Buffer, of: Buffer) =>
          tpm.run(RSA_Decrypt, { keyHandle: withPassword(key) }, { cipherText, inScheme, label: of });
        assert.deepEqual((await decrypt(outData, label)).message, message);
        if (inScheme.scheme === Alg.OAEP) {
          // Part 3, 14.3.1 wants VALUE; libtpms passes on what OpenSSL fails with.
          await assert.rejects(decrypt(outData, Buffer.from('other\0')), says('VALUE', 'FAILURE'));
        }
        await assert.rejects(decrypt(Buffer.concat([outData, outData]), label), says('SIZE'));
      }
      await assert.rejects(
        tpm.run(
          RSA_Encrypt,
          { keyHandle: key },
          { message: randomBytes(250), inScheme: { scheme: Alg.OAEP, hashAlg: Alg.SHA256 }, label },
        ),
        says('VALUE', 'FAILURE'),
      );
    });
  });

  it('EncryptDecrypt2 with a known key is the cipher of node:crypto', async () => {
    const [secret, iv, data] = [randomBytes(16), randomBytes(16), randomBytes(80)];
    await withKey(AES_KEY, secret, async (key) => {
      const run = (inData: Buffer, decrypt: boolean, ivIn = iv) =>
        tpm.run(EncryptDecrypt2, { keyHandle: withPassword(key) }, { inData, decrypt, mode: Alg.NULL, ivIn });
      const { outData } = await run(data, false);
      const cipher = createCipheriv('aes-128-cfb', secret, iv);
      assert.deepEqual(outData, Buffer.concat([cipher.update(data), cipher.final()]));
      assert.deepEqual((await run(outData, true)).outData, data);
      await assert.rejects(run(data, false, randomBytes(5)), says('SIZE', 'VALUE'));
    });
  });

  it('Hash, HMAC and their sequences are those of node:crypto', async () => {
    const data = randomBytes(900);
    const sha = createHash('sha256').update(data).digest();
    const hash = await tpm.run(Hash, {}, { data, hashAlg: Alg.SHA256, hierarchy: Rh.OWNER });
    assert.deepEqual(hash.outHash, sha);
    assert.equal(hash.validation.tag, St.HASHCHECK);
    await assert.rejects(
      tpm.run(Hash, {}, { data, hashAlg: Alg.AES, hierarchy: Rh.OWNER }),
      says('HASH', 'VALUE'),
    );

    const auth = Buffer.from('sequence');
    const started = await tpm.run(HashSequenceStart, {}, { auth, hashAlg: Alg.SHA256 });
    const sequence = sequenceEntity(started.sequenceHandle, auth);
    await inSession(tpm, { kind: 'hmac' }, async (session) => {
      const sequenceHandle = withSession(sequence, session);
      await assert.rejects(
        tpm.run(
          SequenceUpdate,
          { sequenceHandle: withSession(sequenceEntity(sequence.handle), session) },
          { buffer: data },
        ),
        says('AUTH_FAIL', 'BAD_AUTH'),
      );
      await tpm.run(SequenceUpdate, { sequenceHandle }, { buffer: data.subarray(0, 500) });
      const { result } = await tpm.run(
        SequenceComplete,
        { sequenceHandle },
        { buffer: data.subarray(500), hierarchy: Rh.NULL },
      );
      assert.deepEqual(result, sha);
    });

    const secret = randomBytes(32);
    await withKey(HMAC_KEY, secret, async (key) => {
      const expected = createHmac('sha256', secret).update(data).digest();
      const handle = withPassword(key);
      const { outHMAC } = await tpm.run(HMAC, { handle }, { buffer: data, hashAlg: Alg.NULL });
      assert.deepEqual(outHMAC, expected);
      await assert.rejects(tpm.run(HMAC, { handle }, { buffer: data, hashAlg: Alg.SHA384 }), says('VALUE'));
      const { sequenceHandle } = await tpm.run(HMAC_Start, { handle }, { auth: NOTHING, hashAlg: Alg.NULL });
      const { result } = await tpm.run(
        SequenceComplete,
        { sequenceHandle: withPassword(sequenceEntity(sequenceHandle)) },
        { buffer: data, hierarchy: Rh.NULL },
      );
      assert.deepEqual(result, expected);
    });
    await withPrimary(tpm, srkTemplate(), (key) =>
      assert.rejects(
        tpm.run(HMAC_Start, { handle: withPassword(key) }, { auth: NOTHING, hashAlg: Alg.NULL }),
        says('TYPE'),
      ),
    );
  });

  it('EventSequenceComplete hashes for every bank', async () => {
    const data = randomBytes(100);
    const start = async () => {
      const { sequenceHandle } = await tpm.run(HashSequenceStart, {}, { auth: NOTHING, hashAlg: Alg.NULL });
      return withPassword(sequenceEntity(sequenceHandle));
    };
    const { results } = await tpm.run(
      EventSequenceComplete,
      { pcrHandle: withPassword(permanent(16)), sequenceHandle: await start() },
      { buffer: data },
    );
    const sha256 = results.find((entry) => entry.hashAlg === Alg.SHA256);
    assert.deepEqual(sha256?.digest, createHash('sha256').update(data).digest());
    // A hash sequence is no event sequence.
    const { sequenceHandle } = await tpm.run(HashSequenceStart, {}, { auth: NOTHING, hashAlg: Alg.SHA256 });
    const sequence = withPassword(sequenceEntity(sequenceHandle));
    await assert.rejects(
      tpm.run(
        EventSequenceComplete,
        { pcrHandle: withPassword(permanent(16)), sequenceHandle: sequence },
        { buffer: data },
      ),
      says('MODE'),
    );
    await tpm.run(SequenceComplete, { sequenceHandle: sequence }, { buffer: data, hierarchy: Rh.NULL });
  });

  it('TestParms says what the TPM supports', async () => {
    const { type, parameters } = RSA_KEY;
    await tpm.run(TestParms, {}, { parameters: { type, parameters } });
    await assert.rejects(
      tpm.run(TestParms, {}, { parameters: { type, parameters: { ...parameters, keyBits: 1111 } } }),
      says('VALUE'),
    );
    await tpm.run(TestParms, {}, { parameters: { type: AES_KEY.type, parameters: AES_KEY.parameters } });
  });
});
