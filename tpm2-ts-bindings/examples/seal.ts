// Seals a secret to the state of the machine, with the secret encrypted on its way there and back.
import {
  Alg,
  createChild,
  createPrimary,
  inSession,
  loadChild,
  openTpm,
  PCR_Extend,
  type PolicyStep,
  parsePcrSelection,
  pcrDigest,
  permanent,
  policyDigest,
  readPcrs,
  runPolicy,
  sealedTemplate,
  srkTemplate,
  type TpmError,
  Unseal,
  whileLoaded,
  withPassword,
  withSession,
} from 'tpm2-ts-bindings';

const [path = '/dev/tpmrm0', trustedName] = process.argv.slice(2);
const tpm = await openTpm(path);
try {
  // Whoever sits on the bus could offer a key of his own: only the one of the first, trusted run is taken then.
  const pin = trustedName === undefined ? {} : { name: Buffer.from(trustedName, 'hex') };
  await whileLoaded(tpm, createPrimary(tpm, srkTemplate(), pin), async (srk) => {
    console.log(`storage key: ${srk.name.toString('hex')}`);

    const selection = parsePcrSelection('sha256:7,16');
    const digest = pcrDigest(Alg.SHA256, await readPcrs(tpm, selection));
    const policy: PolicyStep[] = [{ assert: 'pcr', selection, digest }];
    const template = sealedTemplate(policyDigest(policy));
    const child = await inSession(tpm, { kind: 'hmac', salt: srk, encrypt: 'in' }, (session) =>
      createChild(tpm, withPassword(srk), template, { data: Buffer.from('a secret'), sessions: [session] }),
    );

    const unseal = () =>
      inSession(tpm, { kind: 'policy', salt: srk, encrypt: 'out' }, (session) =>
        whileLoaded(tpm, loadChild(tpm, withPassword(srk), child), async (sealed) => {
          await runPolicy(tpm, session, policy);
          return (await tpm.run(Unseal, { itemHandle: withSession(sealed, session) }, {})).outData;
        }),
      );
    console.log(`unsealed: ${await unseal()}`);
    const digests = [{ hashAlg: Alg.SHA256, digest: Buffer.alloc(32, 1) }];
    await tpm.run(PCR_Extend, { pcrHandle: withPassword(permanent(16)) }, { digests });
    await unseal().catch((error) => console.log(`PCR 16 extended: ${(error as TpmError).message}`));
  });
} finally {
  await tpm.close();
}
