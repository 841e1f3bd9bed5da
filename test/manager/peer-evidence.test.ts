import assert from 'node:assert/strict';
import { checkAnswer, makeChallenge } from 'vtpm-manager/peer/attestation-key';
import { readPlatform, verifyEvidence } from 'vtpm-manager/peer/evidence';
import { sealSecret, verifyImportKey } from 'vtpm-manager/peer/import-key';
import { evidenceOf, hostOf, transcript } from './peer-fixture.js';
import { Chip, PCRS, refuses } from './root-tpm-fixture.js';

describe('manager: evidence of another host', () => {
  const chip = new Chip();
  it('holds for the host that made it, and gives a secret to its TPM once', async () => {
    const { enrolment } = await chip.enrol();
    await chip.root(async (tpm) => {
      const host = await hostOf(tpm, enrolment);
      const over = transcript();
      const evidence = await evidenceOf(tpm, host, over);
      const platform = readPlatform(host.peer, evidence, over);
      assert.throws(() => verifyEvidence(host.peer, evidence, over), refuses('peer-platform'));
      const peer = {
        ...host.peer,
        platforms: [{ pcrSelection: PCRS, pcrDigest: platform.pcrDigest, approvedAt: 1n }],
      };
      const facts = verifyEvidence(peer, evidence, over);
      const made = makeChallenge(peer.endorsementKey, peer.attestationKey);
      checkAnswer(
        made,
        await tpm.activateCredential(enrolment, host.attestationKey, {
          credentialBlob: Buffer.from(made.challenge.credentialBlob),
          secret: Buffer.from(made.challenge.secret),
        }),
      );
      const key = await tpm.makeImportKey(enrolment, host.attestationKey, PCRS, over);
      verifyImportKey(peer, key, over, facts);
      const { point, secret } = sealSecret(key.publicArea);
      assert.deepEqual(await key.unwrap(point), secret);
      await assert.rejects(key.unwrap(point), refuses('import-key-lost'));
    });
  });
});
