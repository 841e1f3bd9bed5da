import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import {
  Alg,
  attestationKeyTemplate,
  Certify,
  CertifyCreation,
  CreatePrimary,
  flush,
  GetTime,
  NvAttribute as N,
  NV_Certify,
  NV_Write,
  type ObjectEntity,
  objectEntity,
  permanent,
  Quote,
  ReadClock,
  Rh,
  St,
  srkTemplate,
  type Tpm,
  verifyAttest,
  verifyCertify,
  verifyCertifyCreation,
  verifyNvCertify,
  withPassword,
} from 'tpm2-ts-bindings';
import { NOTHING, withPrimary, withSuiteTpm } from '../support/tpm-fixture.js';
import { OWNER, says, withNv } from './make.js';

const inScheme = { scheme: Alg.NULL } as const;
const ENDORSEMENT = permanent(Rh.ENDORSEMENT);

function flip(bytes: Buffer): Buffer {
  const out = Buffer.from(bytes);
  out[out.length - 1] = (out.at(-1) ?? 0) ^ 1;
  return out;
}

describe('tpm2-ts-bindings: statements of a TPM', () => {
  let tpm: Tpm;
  withSuiteTpm((made) => {
    tpm = made;
  });

  it('Certify: this object is in this TPM', async () => {
    await withPrimary(tpm, attestationKeyTemplate(), (ak) =>
      withPrimary(tpm, srkTemplate(), async (object) => {
        const key = ak.publicArea.value;
        const nonce = randomBytes(20);
        const certify = (objectHandle: ObjectEntity, signHandle: ObjectEntity) =>
          tpm.run(
            Certify,
            { objectHandle: withPassword(objectHandle), signHandle: withPassword(signHandle) },
            { qualifyingData: nonce, inScheme },
          );
        const { certifyInfo, signature } = await certify(object, ak);
        const expected = { key, nonce, name: object.name };
        const attest = verifyCertify(certifyInfo, signature, expected);
        assert.deepEqual(attest.attested.name, object.name);
        assert.equal(attest.attested.qualifiedName.length, 34);
        const refused = (text: RegExp, change: Partial<typeof expected>, bytes = certifyInfo) =>
          assert.throws(() => verifyCertify(bytes, signature, { ...expected, ...change }), text);
        refused(/another nonce/, { nonce: randomBytes(20) });
        refused(/another object/, { name: ak.name });
        refused(/does not verify/, { key: object.publicArea.value });
        refused(/does not verify/, {}, flip(certifyInfo));
        await assert.rejects(certify(object, object), says('KEY'), 'a storage key signs nothing');
        // A true quote is no certification.
        const quote = await tpm.run(
          Quote,
          { signHandle: withPassword(ak) },
          { qualifyingData: nonce, inScheme, pcrSelect: [] },
        );
        assert.throws(() => verifyCertify(quote.quoted, quote.signature, expected), /something else/);
        assert.throws(
          () => verifyAttest(St.ATTEST_TIME, quote.quoted, quote.signature, expected),
          /something else/,
        );
      }),
    );
  });

  it('CertifyCreation: this TPM made the object, with that creation data', async () => {
    const nonce = randomBytes(16);
    await withPrimary(tpm, attestationKeyTemplate(), async (ak) => {
      const made = await tpm.run(
        CreatePrimary,
        { primaryHandle: withPassword(OWNER) },
        {
          inSensitive: { userAuth: NOTHING, data: NOTHING },
          inPublic: srkTemplate(),
          outsideInfo: randomBytes(12),
          creationPCR: [{ hash: Alg.SHA256, pcrs: [0] }],
        },
      );
      const object = objectEntity(made.objectHandle, made.outPublic);
      try {
        const certify = (creationHash: Buffer) =>
          tpm.run(
            CertifyCreation,
            { signHandle: withPassword(ak), objectHandle: object },
            { qualifyingData: nonce, creationHash, inScheme, creationTicket: made.creationTicket },
          );
        const { certifyInfo, signature } = await certify(made.creationHash);
        const expected = {
          key: ak.publicArea.value,
          nonce,
          name: object.name,
          creationHash: made.creationHash,
        };
        verifyCertifyCreation(certifyInfo, signature, expected);
        const refused = (text: RegExp, change: Partial<typeof expected>) =>
          assert.throws(
            () => verifyCertifyCreation(certifyInfo, signature, { ...expected, ...change }),
            text,
          );
        refused(/another object/, { name: ak.name });
        refused(/other data/, { creationHash: randomBytes(32) });
        refused(/another nonce/, { nonce: NOTHING });
        await assert.rejects(certify(randomBytes(32)), says('TICKET'));
      } finally {
        await flush(tpm, made.objectHandle);
      }
    });
  });

  it('NV_Certify: what an index holds', async () => {
    const nonce = randomBytes(16);
    const content = randomBytes(32);
    await withPrimary(tpm, attestationKeyTemplate(), (ak) =>
      withNv(tpm, { attributes: N.OWNERWRITE | N.OWNERREAD | N.NO_DA, size: 32 }, async (fresh, current) => {
        const certify = async (size: number, offset: number) => {
          const nvIndex = await current();
          const out = await tpm.run(
            NV_Certify,
            { signHandle: withPassword(ak), authHandle: withPassword(OWNER), nvIndex },
            { qualifyingData: nonce, inScheme, size, offset },
          );
          return { ...out, name: nvIndex.name };
        };
        await assert.rejects(certify(32, 0), says('NV_UNINITIALIZED'));
        const authHandle = withPassword(OWNER);
        await tpm.run(NV_Write, { authHandle, nvIndex: fresh }, { data: content, offset: 0 });
        const { certifyInfo, signature, name } = await certify(20, 5);
        const expected = { key: ak.publicArea.value, nonce, name, offset: 5 };
        const attest = verifyNvCertify(certifyInfo, signature, expected);
        assert.deepEqual(attest.attested.nvContents, content.subarray(5, 25));
        const refused = (text: RegExp, change: Partial<typeof expected>) =>
          assert.throws(() => verifyNvCertify(certifyInfo, signature, { ...expected, ...change }), text);
        refused(/another index/, { name: fresh.name });
        refused(/another offset/, { offset: 0 });
        refused(/another nonce/, { nonce: NOTHING });
        await assert.rejects(certify(32, 1), says('NV_RANGE'));
      }),
    );
  });

  it('GetTime: what the clock says', async () => {
    const nonce = randomBytes(16);
    await withPrimary(tpm, attestationKeyTemplate(), async (ak) => {
      const { currentTime } = await tpm.run(ReadClock, {}, {});
      const getTime = (admin: number) =>
        tpm.run(
          GetTime,
          { privacyAdminHandle: withPassword(permanent(admin)), signHandle: withPassword(ak) },
          { qualifyingData: nonce, inScheme },
        );
      const { timeInfo, signature } = await getTime(ENDORSEMENT.handle);
      const expected = { key: ak.publicArea.value, nonce };
      const { attested } = verifyAttest(St.ATTEST_TIME, timeInfo, signature, expected);
      assert.ok(attested.time.clockInfo.clock >= currentTime.clockInfo.clock);
      assert.equal(typeof attested.firmwareVersion, 'bigint');
      assert.throws(
        () => verifyAttest(St.ATTEST_TIME, flip(timeInfo), signature, expected),
        /does not verify/,
      );
      assert.throws(() => verifyAttest(St.ATTEST_QUOTE, timeInfo, signature, expected), /something else/);
      await assert.rejects(getTime(Rh.OWNER), says('VALUE'));
    });
  });
});
