// A server sends a challenge that only the TPM with this endorsement key, holding this attestation key, can read.
import { randomBytes } from 'node:crypto';
import {
  ObjectAttribute as A,
  ActivateCredential,
  attestationKeyTemplate,
  createPrimary,
  inSession,
  makeCredential,
  openTpm,
  type PolicyStep,
  permanent,
  policyDigest,
  publicArea,
  Rh,
  runPolicy,
  srkTemplate,
  whileLoaded,
  withPassword,
  withSession,
} from 'tpm2-ts-bindings';

const tpm = await openTpm(process.argv[2] ?? '/dev/tpmrm0');
const hierarchy = withPassword(permanent(Rh.ENDORSEMENT));
// The endorsement key as makers certify it: template L-2 of the TCG's EK Credential Profile.
const policy: PolicyStep[] = [{ assert: 'secret', of: hierarchy }];
const template = publicArea({
  ...srkTemplate().value,
  objectAttributes:
    A.fixedTPM | A.fixedParent | A.sensitiveDataOrigin | A.adminWithPolicy | A.restricted | A.decrypt,
  authPolicy: policyDigest(policy),
});
try {
  await whileLoaded(tpm, createPrimary(tpm, template, { hierarchy }), (ek) =>
    whileLoaded(tpm, createPrimary(tpm, attestationKeyTemplate()), async (ak) => {
      console.log(`endorsement key: ${ek.name.toString('hex')}`);
      // The server: it has both public areas, and has checked the certificate of the first.
      const challenge = randomBytes(32);
      const credential = makeCredential(ek.publicArea.value, ak.name, challenge);

      // The machine with the TPM.
      const options = { kind: 'policy', salt: ek, encrypt: 'out' } as const;
      const { certInfo } = await inSession(tpm, options, async (session) => {
        await runPolicy(tpm, session, policy);
        const handles = { activateHandle: withPassword(ak), keyHandle: withSession(ek, session) };
        return tpm.run(ActivateCredential, handles, { ...credential });
      });

      // The server again.
      console.log(certInfo.equals(challenge) ? 'it holds the attestation key' : 'not proved');
    }),
  );
} finally {
  await tpm.close();
}
