// Moves a signing key to a second TPM. The key's policy names the only parent that it can go to.
import { createHash } from 'node:crypto';
import {
  ObjectAttribute as A,
  Alg,
  attestationKeyTemplate,
  createChild,
  createPrimary,
  duplicateTo,
  importChild,
  inSession,
  loadChild,
  openTpm,
  policyDigest,
  publicArea,
  Rh,
  runPolicy,
  Sign,
  St,
  srkTemplate,
  verifySignature,
  whileLoaded,
  withPassword,
} from 'tpm2-ts-bindings';

const [source = '/dev/tpmrm0', target = '/dev/tpmrm1'] = process.argv.slice(2);
const [from, to] = [await openTpm(source), await openTpm(target)];
await whileLoaded(to, createPrimary(to, srkTemplate()), async (newParent) => {
  const only = { assert: 'duplication-select', newParentName: newParent.name, includeObject: false } as const;
  const objectAttributes = A.sign | A.userWithAuth | A.sensitiveDataOrigin;
  const { value } = attestationKeyTemplate();
  const template = publicArea({ ...value, objectAttributes, authPolicy: policyDigest([only]) });

  const parcel = await whileLoaded(from, createPrimary(from, srkTemplate()), async (srk) => {
    const child = await createChild(from, withPassword(srk), template);
    return whileLoaded(from, loadChild(from, withPassword(srk), child), (key) =>
      inSession(from, { kind: 'policy' }, async (session) => {
        await runPolicy(from, session, [{ ...only, objectName: key.name }]);
        return duplicateTo(from, key, session, newParent.publicArea);
      }),
    );
  });

  const child = await importChild(to, withPassword(newParent), parcel);
  await whileLoaded(to, loadChild(to, withPassword(newParent), child), async (key) => {
    const message = Buffer.from('signed by the second TPM');
    const { signature } = await to.run(
      Sign,
      { keyHandle: withPassword(key) },
      {
        digest: createHash('sha256').update(message).digest(),
        inScheme: { scheme: Alg.NULL },
        validation: { tag: St.HASHCHECK, hierarchy: Rh.NULL, digest: Buffer.alloc(0) },
      },
    );
    console.log(`verifies: ${verifySignature(key.publicArea.value, message, signature)}`);
  });
});
await Promise.all([from.close(), to.close()]);
