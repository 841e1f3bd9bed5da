import assert from 'node:assert/strict';
import { createECDH, createHash, randomBytes } from 'node:crypto';
import {
  Alg,
  agreementKeyTemplate,
  attestationKeyTemplate,
  ECDH_ZGen,
  ENDORSEMENT_KEY_NAMES,
  type EndorsementKeyName,
  embed,
  endorsementKeyKind,
  endorsementKeyTemplate,
  endorsementPolicy,
  inSession,
  isMadeFrom,
  leftPad,
  NvAttribute as N,
  NvIndex,
  type ObjectEntity,
  parsePcrSelection,
  permanent,
  policyDigest,
  Quote,
  Rh,
  rsaSrkTemplate,
  runPolicy,
  Sign,
  type SigningKeyName,
  St,
  sealedTemplate,
  signingKeyTemplate,
  srkTemplate,
  storageKeyTemplate,
  type Tpm,
  tpmsNvPublic,
  Unseal,
  verifyAttest,
  verifySignature,
  withPassword,
  withSession,
} from 'tpm2-ts-bindings';
import { NOTHING, withPrimary, withSuiteTpm } from '../support/tpm-fixture.js';
import { type Tpm2Tools, withSuiteTools } from '../support/tpm2-tools.js';
import { publicFile } from '../support/tpm2-tools-files.js';
import { create, says, withChild } from './make.js';

/** EK Credential Profile 2.5, annex B.6: PolicyA, the Name of its index, PolicyC, PolicyB. */
const PUBLISHED = [
  {
    alg: Alg.SHA256,
    index: NvIndex.EK_POLICY_SHA256,
    a: '837197674484b3f81a90cc8d46a5d724fd52d76e06520b64f2a1da1b331469aa',
    c: '3767e2edd43ff45a3a7e1eaefcef78643dca964632e7aad82c673a30d8633fde',
    b: 'ca3d0a99a2b93906f7a3342414efcfb3a385d44cd1fd459089d19b5071c0b7a0',
  },
  {
    alg: Alg.SHA384,
    index: NvIndex.EK_POLICY_SHA384,
    a: '8bbf2266537c171cb56e403c4dc1d4b64f432611dc386e6f532050c3278c930e143e8bb1133824ccb431053871c6db53',
    c: 'd6032ce61f2fb3c240eb3cf6a33237ef2b6a16f4293c22b455e261cffd217ad5b4947c2d73e63005eed2dc2b3593d165',
    b: 'b26e7d28d11a50bc53d882bcf5fd3a1a074148bb35d3b4e4cb1c0ad9bde419cacb47ba09699646150f9fc000f3f80e12',
  },
  {
    alg: Alg.SHA512,
    index: NvIndex.EK_POLICY_SHA512,
    a: '1e3b76502c8a1425aa0b7b3fc646a1b0fae063b03b5368f9c4cddecaff0891dd682bac1a85d4d832b781ea451915de5fc5bf0dc4a1917cd42fa041e3f998e0ee',
    c: '589ee1e146544716e8deafe6db247b01b81e9f9c7dd16b814aa159138749105fba5388dd1dea702f35240c184933121e2c61b8f50d3ef91393a49a38c3f73fc8',
    b: 'b8221ca69e8550a4914de3faa6a18c072cc01208073a928d5d66d59ef79e49a429c41a6b269571d57edb25fbdb1838425608b413cd616a5f6db5b6071af99bea',
  },
] as const;

/** What tpm2_createek calls the kinds that it and the TPM know. */
const PEER: Readonly<Partial<Record<EndorsementKeyName, string>>> = {
  'L-1': 'rsa2048',
  'L-2': 'ecc256',
  'H-3': 'ecc384',
  'H-4': 'ecc521',
  'H-6': 'rsa3072',
};
const SIGNING = [
  'ecdsa-p256',
  'ecdsa-p384',
  'rsassa-2048',
  'rsapss-2048',
] as const satisfies SigningKeyName[];

const ENDORSEMENT = permanent(Rh.ENDORSEMENT);

describe('tpm2-ts-bindings: key templates', () => {
  let tpm: Tpm;
  withSuiteTpm((made) => {
    tpm = made;
  });

  it('PolicyA, PolicyC and PolicyB are the published ones', () => {
    for (const { alg, index, a, b, c } of PUBLISHED) {
      const policyA = policyDigest(endorsementPolicy('L-1'), alg);
      assert.equal(policyA.toString('hex'), a);
      // PolicyC names the index with everything that is in its public area.
      const { bytes } = embed(tpmsNvPublic, {
        nvIndex: index,
        nameAlg: alg,
        attributes:
          N.POLICYWRITE |
          N.WRITEALL |
          N.PPREAD |
          N.OWNERREAD |
          N.AUTHREAD |
          N.POLICYREAD |
          N.NO_DA |
          N.WRITTEN,
        authPolicy: policyA,
        dataSize: policyA.length + 2,
      });
      const hashName = { [Alg.SHA256]: 'sha256', [Alg.SHA384]: 'sha384', [Alg.SHA512]: 'sha512' }[alg];
      const hash = (...parts: Buffer[]) => createHash(hashName).update(Buffer.concat(parts)).digest();
      const name = Buffer.concat([bytes.subarray(4, 6), hash(bytes)]);
      const policyAuthorizeNv = Buffer.from('00000192', 'hex');
      assert.equal(hash(Buffer.alloc(policyA.length), policyAuthorizeNv, name).toString('hex'), c);
      const kinds = ENDORSEMENT_KEY_NAMES.filter(
        (kind) => kind.startsWith('H') && endorsementKeyKind(kind).nameAlg === alg,
      );
      assert.ok(kinds.length > 0);
      for (const kind of kinds) {
        assert.equal(endorsementKeyTemplate(kind).value.authPolicy.toString('hex'), b, kind);
      }
    }
  });

  it('the high range has an empty unique: other keys than the low range with the same algorithms', async () => {
    for (const [low, high] of [
      ['L-1', 'H-1'],
      ['L-2', 'H-2'],
    ] as const) {
      const make = (name: EndorsementKeyName) =>
        withPrimary(
          tpm,
          endorsementKeyTemplate(name),
          async (key) => key.publicArea.value,
          NOTHING,
          ENDORSEMENT,
        );
      const [ours, other] = [await make(low), await make(high)];
      assert.deepEqual(other.parameters, ours.parameters);
      assert.notDeepEqual(other.unique, ours.unique);
      const { unique } = endorsementKeyTemplate(high).value;
      assert.ok(Buffer.isBuffer(unique) ? unique.length === 0 : unique.x.length + unique.y.length === 0);
    }
  });

  it('H-7 needs RSA 4096, which libtpms refuses', async () => {
    await assert.rejects(
      withPrimary(tpm, endorsementKeyTemplate('H-7'), async () => undefined, NOTHING, ENDORSEMENT),
      says('VALUE'),
    );
  });

  it('storage root keys and storage keys keep data, the latter under a key with the same hash and cipher', async () => {
    assert.deepEqual(srkTemplate('L-1').bytes, rsaSrkTemplate().bytes);
    const data = randomBytes(32);
    const steps = [{ assert: 'command-code', code: Unseal.code }] as const;
    const seal = async (parent: ObjectEntity) => {
      const sealed = await create(tpm, parent, sealedTemplate(policyDigest(steps)), { data });
      await withChild(tpm, parent, sealed, (item) =>
        inSession(tpm, { kind: 'policy' }, async (session) => {
          await runPolicy(tpm, session, steps);
          const { outData } = await tpm.run(Unseal, { itemHandle: withSession(item, session) }, {});
          assert.deepEqual(outData, data);
        }),
      );
    };
    for (const name of ['L-1', 'L-2', 'H-2', 'H-3', 'H-4'] as const) {
      await withPrimary(tpm, srkTemplate(name), seal);
    }
    for (const [parent, name] of [
      ['L-1', 'H-1'],
      ['L-2', 'H-2'],
      ['L-2', 'H-1'],
      ['H-3', 'H-3'],
    ] as const) {
      await withPrimary(tpm, srkTemplate(parent), async (srk) =>
        withChild(tpm, srk, await create(tpm, srk, storageKeyTemplate(name)), seal),
      );
    }
    await withPrimary(tpm, srkTemplate('L-2'), (srk) =>
      assert.rejects(create(tpm, srk, storageKeyTemplate('H-3')), says('HASH')),
    );
  });

  it('agreement keys agree under their policy alone, and are another one for another unique', async () => {
    const steps = [{ assert: 'command-code', code: ECDH_ZGen.code }] as const;
    const template = (x = NOTHING) => agreementKeyTemplate(policyDigest(steps), { x, y: NOTHING });
    await withPrimary(tpm, template(), async (key) => {
      assert.ok(isMadeFrom(key.publicArea, template()));
      assert.ok(!isMadeFrom(key.publicArea, agreementKeyTemplate(randomBytes(32))));
      assert.ok(!isMadeFrom(key.publicArea, attestationKeyTemplate()));
      assert.ok(!isMadeFrom(sealedTemplate(NOTHING), sealedTemplate(NOTHING)), 'no key');
      const other = createECDH('prime256v1');
      const own = other.generateKeys();
      const inPoint = { x: own.subarray(1, 33), y: own.subarray(33) };
      await assert.rejects(
        tpm.run(ECDH_ZGen, { keyHandle: withPassword(key) }, { inPoint }),
        says('AUTH_UNAVAILABLE'),
      );
      const z = await inSession(tpm, { kind: 'policy' }, async (session) => {
        await runPolicy(tpm, session, steps);
        return (await tpm.run(ECDH_ZGen, { keyHandle: withSession(key, session) }, { inPoint })).outPoint.x;
      });
      const { value } = key.publicArea;
      assert.ok(value.type === Alg.ECC);
      const point = Buffer.concat([Buffer.of(4), leftPad(value.unique.x, 32), leftPad(value.unique.y, 32)]);
      assert.deepEqual(leftPad(z, 32), other.computeSecret(point));
      await withPrimary(tpm, template(randomBytes(32)), async (second) =>
        assert.notDeepEqual(second.name, key.name),
      );
    });
  });

  for (const name of SIGNING) {
    it(`${name}: an attestation key signs what the TPM says, a signing key any digest`, async () => {
      const inScheme = { scheme: Alg.NULL } as const;
      const message = randomBytes(100);
      const hash = name === 'ecdsa-p384' ? 'sha384' : 'sha256';
      const digest = createHash(hash).update(message).digest();
      const validation = { tag: St.HASHCHECK, hierarchy: Rh.NULL, digest: NOTHING } as const;
      const sign = (key: ObjectEntity) =>
        tpm.run(Sign, { keyHandle: withPassword(key) }, { digest, inScheme, validation });
      await withPrimary(tpm, attestationKeyTemplate(name), async (key) => {
        const nonce = randomBytes(16);
        const { quoted, signature } = await tpm.run(
          Quote,
          { signHandle: withPassword(key) },
          { qualifyingData: nonce, inScheme, pcrSelect: parsePcrSelection('sha256:0') },
        );
        verifyAttest(St.ATTEST_QUOTE, quoted, signature, { key: key.publicArea.value, nonce });
        await assert.rejects(sign(key), says('TICKET'));
      });
      await withPrimary(tpm, srkTemplate(), async (srk) =>
        withChild(tpm, srk, await create(tpm, srk, signingKeyTemplate(name)), async (key) => {
          const { signature } = await sign(key);
          assert.ok(verifySignature(key.publicArea.value, message, signature));
          assert.ok(!verifySignature(key.publicArea.value, randomBytes(100), signature));
        }),
      );
    });
  }
});

describe('tpm2-ts-bindings and tpm2-tools: endorsement keys', () => {
  let tools: Tpm2Tools;
  withSuiteTools((made) => {
    tools = made;
  });

  for (const [name, peer] of Object.entries(PEER) as [EndorsementKeyName, string][]) {
    it(`${name} makes the key that tpm2_createek -G ${peer} makes`, async () => {
      await tools.run(`tpm2_createek -Q -G ${peer} -c ek.ctx -u ek.pub`);
      const theirs = tools.read('ek.pub', publicFile);
      await tools.direct((tpm) =>
        withPrimary(
          tpm,
          endorsementKeyTemplate(name),
          async (key) => assert.deepEqual(key.publicArea.bytes, theirs.bytes),
          NOTHING,
          ENDORSEMENT,
        ),
      );
    });
  }
});
