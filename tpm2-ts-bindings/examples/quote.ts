// One side has the TPM and quotes its registers; the other side has only the key's public area, and verifies.
import { randomBytes } from 'node:crypto';
import {
  Alg,
  attestationKeyTemplate,
  createPrimary,
  openTpm,
  parsePcrSelection,
  Quote,
  readPcrs,
  TpmError,
  verifyQuote,
  whileLoaded,
  withPassword,
} from 'tpm2-ts-bindings';

const tpm = await openTpm(process.argv[2] ?? '/dev/tpmrm0');
const selection = parsePcrSelection('sha256:0,1,2,3,4,7');
try {
  // The verifier chooses it: a quote over a nonce of its own was made after that.
  const nonce = randomBytes(16);

  const evidence = await whileLoaded(tpm, createPrimary(tpm, attestationKeyTemplate()), async (ak) => {
    const { quoted, signature } = await tpm.run(
      Quote,
      { signHandle: withPassword(ak) },
      { qualifyingData: nonce, inScheme: { scheme: Alg.NULL }, pcrSelect: selection },
    );
    return { quoted, signature, values: await readPcrs(tpm, selection), publicArea: ak.publicArea };
  });

  // From here on no TPM is needed. That `key` is in a TPM is for credential activation to show.
  const { quoted, signature, values } = evidence;
  const key = evidence.publicArea.value;
  const attest = verifyQuote(quoted, signature, { key, nonce, selection, values });
  console.log(`verified: PCR digest ${attest.attested.pcrDigest.toString('hex')}`);
  try {
    verifyQuote(quoted, signature, { key, nonce: randomBytes(16), selection, values });
  } catch (error) {
    if (error instanceof TpmError) console.log(`refused: ${error.message}`);
  }
} finally {
  await tpm.close();
}
