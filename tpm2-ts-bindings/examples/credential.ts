// A server sends a challenge that only the TPM with this endorsement key, holding this attestation key, can read.
import { randomBytes } from 'node:crypto';
import {
  activateCredential,
  attestationKeyTemplate,
  createPrimary,
  endorsementKeyTemplate,
  makeCredential,
  openTpm,
  permanent,
  Rh,
  whileLoaded,
  withPassword,
} from 'tpm2-ts-bindings';

const tpm = await openTpm(process.argv[2] ?? '/dev/tpmrm0');
const hierarchy = withPassword(permanent(Rh.ENDORSEMENT));
try {
  // The endorsement key as makers certify it: template L-2 of the TCG's EK Credential Profile.
  const template = endorsementKeyTemplate('L-2');
  await whileLoaded(tpm, createPrimary(tpm, template, { hierarchy }), (entity) =>
    whileLoaded(tpm, createPrimary(tpm, attestationKeyTemplate()), async (ak) => {
      console.log(`endorsement key: ${entity.name.toString('hex')}`);
      // The server: it has both public areas, and has checked the certificate of the first.
      const challenge = randomBytes(32);
      const credential = makeCredential(entity.publicArea.value, ak.name, challenge);

      // The machine with the TPM.
      const ek = { name: 'L-2', entity, by: hierarchy } as const;
      const answer = await activateCredential(tpm, ek, withPassword(ak), credential);

      // The server again.
      console.log(answer.equals(challenge) ? 'it holds the attestation key' : 'not proved');
    }),
  );
} finally {
  await tpm.close();
}
