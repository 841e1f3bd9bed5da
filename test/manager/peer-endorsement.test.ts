import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { writeFileSync } from 'node:fs';
import fc from 'fast-check';
import {
  ObjectAttribute as A,
  Alg,
  attestationKeyTemplate,
  decode,
  EvictControl,
  endorsementKeyTemplate,
  HierarchyChangeAuth,
  NvIndex,
  objectEntity,
  PersistentHandle,
  type Public,
  permanent,
  publicArea,
  Rh,
  tpmtPublic,
  withPassword,
} from 'tpm2-ts-bindings';
import { ManagerError } from 'vtpm-manager/error';
import { acceptAttestationKey, checkAnswer, makeChallenge } from 'vtpm-manager/peer/attestation-key';
import { acceptEndorsement, endorsementFingerprint } from 'vtpm-manager/peer/endorsement';
import { attestationPublic } from 'vtpm-manager/root-tpm/index';
import { isA } from '../support/is-a.js';
import { NOTHING, withPrimary } from '../support/tpm-fixture.js';
import { Maker } from '../tpm2-ts-bindings/maker.js';
import { LyingTpm } from './peer-fixture.js';
import { Chip, refuses } from './root-tpm-fixture.js';

const ENDORSEMENT = permanent(Rh.ENDORSEMENT);
const toPem = (...certificates: readonly { toString(): string }[]): string =>
  certificates.map((one) => one.toString()).join('\n');

describe('manager: which TPM another host has', () => {
  const chip = new Chip();

  describe('by its certificate', function () {
    this.timeout(120_000);
    let maker: Maker;
    before(() => {
      maker = new Maker();
    });
    after(() => maker.remove());
    const offered = async (...options: string[]) => {
      await maker.manufacture(chip.swtpm, ...options);
      return chip.root((tpm) => tpm.endorsement());
    };

    it('is accepted under the authority of its maker, and under no other', async () => {
      const endorsement = await offered();
      assert.equal(endorsement.certificates.length, 1);
      const ca = toPem(maker.issuer, maker.root);
      assert.match(acceptEndorsement(endorsement, { ca }), /CN=swtpm-localca/);
      assert.throws(
        () => acceptEndorsement(endorsement, { ca: toPem(maker.root) }),
        refuses('peer-ek', /no trusted root vouches for it/),
        'what lies between is not there',
      );
      // Of the same name.
      writeFileSync(
        maker.file('liar.template'),
        'cn = swtpm-localca\nca\ncert_signing_key\nexpiration_days = 10\n',
      );
      const key = maker.file('liar.key');
      await maker.tool('certtool', '--generate-privkey', '--outfile', key);
      const own = ['--load-privkey', key, '--template', maker.file('liar.template')];
      await maker.tool('certtool', '--generate-self-signed', ...own, '--outfile', maker.file('liar.pem'));
      assert.throws(
        () => acceptEndorsement(endorsement, { ca: toPem(maker.certificate('liar.pem')) }),
        refuses('peer-ek', /no trusted root vouches for it/),
      );
    });

    it('is refused where the certificate is for another key, or there is none: peer-ek', async () => {
      const endorsement = await offered();
      const ca = toPem(maker.issuer, maker.root);
      const { bytes } = new LyingTpm().attestationKey;
      assert.throws(
        () => acceptEndorsement({ ...endorsement, publicArea: ekOf(bytes) }, { ca }),
        refuses('peer-ek', /the certificate is for another key/),
      );
      assert.throws(
        () => acceptEndorsement({ ...endorsement, certificates: [] }, { ca }),
        refuses('peer-ek', /--ek-fingerprint/),
      );
      const junk = { ...endorsement, certificates: [randomBytes(100)] };
      assert.throws(() => acceptEndorsement(junk, { ca }), refuses('peer-ek'));
      const many = { ...endorsement, certificates: Array(17).fill(endorsement.certificates[0]) };
      assert.throws(() => acceptEndorsement(many, { ca }), refuses('peer-ek', /more than 16/));
      for (const nothing of ['', 'x', toPem(maker.root).replace(/MII/, 'AAA')]) {
        assert.throws(() => acceptEndorsement(endorsement, { ca: nothing }), refuses('bad-request'));
      }
    });

    it('is an ECC key where the TPM has the certificate of one, otherwise an RSA key; each answers a challenge', async () => {
      await maker.manufacture(chip.swtpm);
      const { enrolment } = await chip.enrol();
      const ca = toPem(maker.issuer, maker.root);
      const typeOf = () =>
        chip.root(async (tpm) => {
          const endorsement = await tpm.endorsement();
          assert.ok(acceptEndorsement(endorsement, { ca }));
          const blob = await tpm.makeAttestationKey(enrolment);
          const made = makeChallenge(endorsement.publicArea, attestationPublic(blob));
          checkAnswer(made, await tpm.activateCredential(enrolment, blob, credential(made)));
          return decode(tpmtPublic, endorsement.publicArea).type;
        });
      assert.equal(await typeOf(), Alg.ECC);
      const index = `0x${NvIndex.EK_CERTIFICATE_H3.toString(16)}`;
      await chip.tools('/', 'tpm2_nvundefine', index, '-C', 'p');
      assert.equal(await typeOf(), Alg.RSA);
    });
  });

  it('by its fingerprint, however that is written', async () => {
    const endorsement = await chip.root((tpm) => tpm.endorsement());
    assert.deepEqual(endorsement.certificates, []);
    const fingerprint = endorsementFingerprint(endorsement.publicArea);
    for (const written of [
      fingerprint,
      ` ${fingerprint.toUpperCase()}\n`,
      `000b${fingerprint}`,
      `0x000B${fingerprint}`,
    ]) {
      assert.equal(acceptEndorsement(endorsement, { fingerprint: written }), 'pinned');
    }
    await withEndorsementKey((entity) => {
      assert.equal(entity.name.toString('hex'), `000b${fingerprint}`, 'the Name that tpm2-tools show');
    });
    assert.throws(
      () => acceptEndorsement(endorsement, { fingerprint: '00'.repeat(32) }),
      refuses('peer-ek', new RegExp(`has the fingerprint ${fingerprint} .*another TPM`)),
    );
    assert.throws(
      () => acceptEndorsement(endorsement, { fingerprint: 'abc' }),
      refuses('bad-request', /64 hex/),
    );
  });

  it('is refused where it could be outside of a TPM, or is no storage key: peer-ek', () => {
    const { value } = endorsementKeyTemplate('L-2');
    const pinned = (objectAttributes: number) => () => {
      const { bytes } = publicArea({ ...value, objectAttributes } as Public);
      return acceptEndorsement(
        { publicArea: bytes, certificates: [] },
        { fingerprint: endorsementFingerprint(bytes) },
      );
    };
    assert.equal(pinned(value.objectAttributes)(), 'pinned');
    for (const missing of [A.fixedTPM, A.fixedParent, A.sensitiveDataOrigin, A.restricted, A.decrypt]) {
      assert.throws(pinned(value.objectAttributes & ~missing), refuses('peer-ek'));
    }
    assert.throws(pinned(value.objectAttributes | A.sign), refuses('peer-ek', /no storage key/));
  });

  it('takes the key that is kept in the TPM already, if it is that one', async () => {
    const fresh = await chip.root((tpm) => tpm.endorsement());
    const keep = (template: ReturnType<typeof endorsementKeyTemplate>) =>
      withEndorsementKey(
        (entity, tpm) =>
          tpm.run(
            EvictControl,
            { auth: withPassword(permanent(Rh.OWNER)), objectHandle: entity },
            { persistentHandle: PersistentHandle.EK_ECC },
          ),
        template,
      );
    await keep(endorsementKeyTemplate('L-2'));
    // A password on the hierarchy: made anew it could not be.
    await chip.direct((tpm) =>
      tpm.run(HierarchyChangeAuth, { authHandle: withPassword(ENDORSEMENT) }, { newAuth: Buffer.from('x') }),
    );
    assert.deepEqual(await chip.root((tpm) => tpm.endorsement()), fresh);
    await keepAnother();
    await assert.rejects(
      chip.root((tpm) => tpm.endorsement()),
      refuses('tpm-unfit', /endorsement hierarchy has a password.*tpm2_changeauth/),
    );

    /** What is at the handle is another kind of key now. */
    async function keepAnother(): Promise<void> {
      await chip.direct(async (tpm) => {
        const kept = objectEntity(PersistentHandle.EK_ECC, {
          bytes: fresh.publicArea,
          value: decode(tpmtPublic, fresh.publicArea),
        });
        const auth = withPassword(permanent(Rh.OWNER));
        await tpm.run(EvictControl, { auth, objectHandle: kept }, { persistentHandle: kept.handle });
        await withPrimary(tpm, attestationKeyTemplate(), (other) =>
          tpm.run(EvictControl, { auth, objectHandle: other }, { persistentHandle: kept.handle }),
        );
      });
    }
  });

  describe('and the key that it signs with', () => {
    it('are in one TPM: only that answers the challenge', async () => {
      const { enrolment } = await chip.enrol();
      await chip.root(async (tpm) => {
        const blob = await tpm.makeAttestationKey(enrolment);
        const { publicArea: ek } = await tpm.endorsement();
        const ak = attestationPublic(blob);
        acceptAttestationKey(ak);
        const made = makeChallenge(ek, ak);
        checkAnswer(made, await tpm.activateCredential(enrolment, blob, credential(made)));
        // Keys of one TPM each.
        const wrong = makeChallenge(ek, new LyingTpm().attestationKey.bytes);
        await assert.rejects(
          tpm.activateCredential(enrolment, blob, credential(wrong)),
          refuses('peer-ek', /not for the endorsement and attestation key of this one/),
        );
        const foreign = makeChallenge(ekOf(new LyingTpm().attestationKey.bytes), ak);
        await assert.rejects(
          tpm.activateCredential(enrolment, blob, credential(foreign)),
          refuses('peer-ek'),
        );
        for (const answer of [NOTHING, randomBytes(32), randomBytes(33), made.answer.subarray(1)]) {
          assert.throws(() => checkAnswer(made, answer), refuses('peer-ak', /did not answer the challenge/));
        }
      });
    });

    it('I-10 a challenge of any bytes is refused by name', async () => {
      const { enrolment } = await chip.enrol();
      await chip.root(async (tpm) => {
        const blob = await tpm.makeAttestationKey(enrolment);
        const made = makeChallenge((await tpm.endorsement()).publicArea, attestationPublic(blob));
        const noise = fc.uint8Array({ maxLength: 600 });
        const pairs = fc.record({
          credentialBlob: fc.oneof(noise, fc.constant(made.challenge.credentialBlob)),
          secret: fc.oneof(noise, fc.constant(made.challenge.secret)),
        });
        await fc.assert(
          fc.asyncProperty(pairs, async (challenge) => {
            try {
              const answer = await tpm.activateCredential(enrolment, blob, credential({ challenge }));
              assert.deepEqual(answer, made.answer);
            } catch (error) {
              assert.ok(isA(error, ManagerError) && error.code === 'peer-ek', String(error));
            }
          }),
          { numRuns: 30 },
        );
      });
    });

    it('is refused with any attribute or scheme other than it has to have: peer-ak', () => {
      const { value } = new LyingTpm().attestationKey;
      assert.ok(value.type === Alg.ECC);
      const changed = (change: Partial<Public>) => () =>
        acceptAttestationKey(publicArea({ ...value, ...change } as Public).bytes);
      changed({})();
      for (let bit = 0; bit < 32; bit++) {
        const objectAttributes = (value.objectAttributes ^ (1 << bit)) >>> 0;
        assert.throws(changed({ objectAttributes }), refuses('peer-ak', /not of the one kind/), `bit ${bit}`);
      }
      for (const named of [A.restricted, A.sign, A.fixedTPM, A.fixedParent, A.sensitiveDataOrigin]) {
        assert.notEqual(value.objectAttributes & named, 0);
      }
      const { parameters } = value;
      assert.throws(changed({ authPolicy: randomBytes(32) }), refuses('peer-ak'));
      assert.throws(
        changed({ parameters: { ...parameters, scheme: { scheme: Alg.NULL } } }),
        refuses('peer-ak'),
      );
      assert.throws(changed({ unique: { x: randomBytes(32), y: randomBytes(32) } }), refuses('peer-ak'));
      fc.assert(
        fc.property(fc.uint8Array({ maxLength: 200 }), (bytes) => {
          assert.throws(() => acceptAttestationKey(bytes), refuses('peer-ak'));
          assert.throws(() => makeChallenge(bytes, bytes), refuses('peer-ak'));
        }),
      );
    });

    it('is of no use in another TPM: tpm-changed', async () => {
      const { enrolment } = await chip.enrol();
      const blob = await chip.root((tpm) => tpm.makeAttestationKey(enrolment));
      await chip.tools('/', 'tpm2_clear', '-c', 'p');
      const next = await chip.enrol();
      await assert.rejects(
        chip.root((tpm) => tpm.quote(next.enrolment, blob, 'sha256:7', randomBytes(32))),
        refuses('tpm-changed', /attestation key of this host/),
      );
      await assert.rejects(
        chip.root((tpm) => tpm.quote(next.enrolment, blob.subarray(1), 'sha256:7', randomBytes(32))),
        refuses('store-corrupt'),
      );
    });
  });

  function withEndorsementKey<T>(
    body: (
      entity: ReturnType<typeof objectEntity>,
      tpm: Parameters<Parameters<Chip['direct']>[0]>[0],
    ) => T | Promise<T>,
    template = endorsementKeyTemplate('L-2'),
  ): Promise<T> {
    return chip.direct((tpm) =>
      withPrimary(tpm, template, async (entity) => body(entity, tpm), NOTHING, ENDORSEMENT),
    );
  }
});

/** The storage key of a liar, which claims to be an endorsement key. */
function ekOf(attestationKey: Uint8Array): Buffer {
  const { value } = endorsementKeyTemplate('L-2');
  const key = decode(tpmtPublic, attestationKey);
  assert.ok(value.type === Alg.ECC && key.type === Alg.ECC);
  return publicArea({ ...value, unique: key.unique }).bytes;
}

function credential({ challenge }: { challenge: { credentialBlob: Uint8Array; secret: Uint8Array } }) {
  return {
    credentialBlob: Buffer.from(challenge.credentialBlob),
    secret: Buffer.from(challenge.secret),
  };
}
