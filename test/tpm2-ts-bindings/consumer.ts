// A program of someone who installed the package: package.test.ts compiles and runs it outside of this repository.
import {
  Alg,
  encode,
  NV_Write,
  type ObjectEntity,
  openSession,
  openTpm,
  publicArea,
  readRandom,
  type Session,
  type SessionOptions,
  type Signature,
  srkTemplate,
  type Tpm,
  tpmtSymDef,
  Unseal,
  withPassword,
  withSession,
} from 'tpm2-ts-bindings';

/** Never called: what a compiler has to refuse. A line without an error is an error itself. */
export async function refused(tpm: Tpm, key: ObjectEntity, session: Session): Promise<void> {
  // @ts-expect-error the handle is missing
  await tpm.run(Unseal, {}, {});
  // @ts-expect-error the handle has another name
  await tpm.run(Unseal, { keyHandle: withSession(key, session) }, {});
  // @ts-expect-error its authorisation is missing
  await tpm.run(Unseal, { itemHandle: key }, {});
  // @ts-expect-error a parameter is missing
  await tpm.run(NV_Write, { authHandle: withPassword(key), nvIndex: key }, { data: Buffer.alloc(1) });
  // @ts-expect-error the result has no such field
  (await tpm.run(Unseal, { itemHandle: withSession(key, session) }, {})).data;

  const { value } = srkTemplate();
  // @ts-expect-error the parameters are those of an ECC key
  publicArea({ ...value, type: Alg.RSA, parameters: { symmetric: { algorithm: Alg.NULL }, keyBits: 2048 } });
  // @ts-expect-error AES has a key size and a mode
  encode(tpmtSymDef, { algorithm: Alg.AES });
  // @ts-expect-error `sig` is of RSA
  const signature: Signature = { sigAlg: Alg.ECDSA, hash: Alg.SHA256, sig: Buffer.alloc(1) };
  // @ts-expect-error which arm it is has to be looked at first
  signature.signatureR;

  // @ts-expect-error without salt or bind it would hide nothing
  await openSession(tpm, { kind: 'hmac', encrypt: 'both' });
  // @ts-expect-error to encrypt without salt or bind
  const options: SessionOptions = { kind: 'policy', encrypt: 'out' };
  await openSession(tpm, { ...options, salt: key, encrypt: 'out' });
}

console.log(encode(tpmtSymDef, { algorithm: Alg.AES, keyBits: 128, mode: Alg.CFB }).toString('hex'));
const [path] = process.argv.slice(2);
if (path !== undefined) {
  const tpm = await openTpm(path);
  console.log((await readRandom(tpm, 8)).length);
  await tpm.close();
}
