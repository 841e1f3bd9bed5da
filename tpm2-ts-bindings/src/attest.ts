import { constants, verify } from 'node:crypto';
import { leftPad } from './bytes.js';
import { Reader, struct, tagged, tpm2b, u16, u32, u64, type ValueOf } from './codec.js';
import { Alg, Curve, hashInfo, St } from './constants.js';
import { requireHash } from './crypto.js';
import { TpmError } from './error.js';
import { formatPcrSelection, pcrDigest } from './pcr.js';
import { publicKeyObject } from './public-key.js';
import {
  type PcrSelection,
  type Public,
  type Signature,
  tpmlPcrSelection,
  tpmsClockInfo,
} from './structures.js';

/** What a TPM says and signs (Part 2, 10.12), checked with node:crypto alone: the verifier needs no TPM. */

/** TPM_GENERATED_VALUE: a restricted key signs nothing from outside that starts with it. */
const MAGIC = 0xff544347;

const head = { qualifiedSigner: tpm2b, extraData: tpm2b, clockInfo: tpmsClockInfo, firmwareVersion: u64 };

/** TPMS_ATTEST without its magic. */
const tpmsAttest = tagged('type', u16, {
  [St.ATTEST_QUOTE]: struct({ ...head, attested: struct({ pcrSelect: tpmlPcrSelection, pcrDigest: tpm2b }) }),
  [St.ATTEST_CERTIFY]: struct({ ...head, attested: struct({ name: tpm2b, qualifiedName: tpm2b }) }),
});
export type Attest = ValueOf<typeof tpmsAttest>;

/** @param bytes as the TPM gave them. @throws TpmError `malformed` */
export function parseAttest(bytes: Uint8Array): Attest {
  const reader = new Reader(bytes, 'attestation');
  if (u32.read(reader) !== MAGIC) throw new TpmError('malformed', 'attestation: not made by a TPM');
  const attest = tpmsAttest.read(reader);
  reader.end();
  return attest;
}

/** True where `signature` is over `message` by `key`. Unknown combinations are false. */
export function verifySignature(key: Public, message: Uint8Array, signature: Signature): boolean {
  const hash = hashInfo(signature.hash);
  if (hash === undefined) return false;
  const object = publicKeyObject(key);
  if (signature.sigAlg === Alg.ECDSA) {
    if (key.type !== Alg.ECC) return false;
    const size = key.parameters.curveID === Curve.NIST_P384 ? 48 : 32;
    const rs = Buffer.concat([leftPad(signature.signatureR, size), leftPad(signature.signatureS, size)]);
    return verify(hash.name, message, { key: object, dsaEncoding: 'ieee-p1363' }, rs);
  }

  if (key.type !== Alg.RSA) return false;
  return verify(
    hash.name,
    message,
    {
      key: object,
      padding:
        signature.sigAlg === Alg.RSASSA ? constants.RSA_PKCS1_PADDING : constants.RSA_PKCS1_PSS_PADDING,
    },
    signature.sig,
  );
}

/** What the verifier of a quote expects. */
export interface ExpectedQuote {
  readonly key: Public;
  /** The nonce the quote was asked with (qualifyingData). */
  readonly nonce: Uint8Array;
  readonly selection: PcrSelection;
  /** Values of the registers in the order of selection. */
  readonly values: readonly Buffer[];
}

/**
 * Checks a quote: signature, nonce, selection and register values.
 * @throws TpmError `malformed` with what does not fit
 */
export function verifyQuote(quoted: Buffer, signature: Signature, expected: ExpectedQuote): Attest {
  if (!verifySignature(expected.key, quoted, signature)) {
    throw new TpmError('malformed', 'quote: the signature does not verify');
  }
  const attest = parseAttest(quoted);
  if (attest.type !== St.ATTEST_QUOTE) throw new TpmError('malformed', 'quote: signed for something else');
  if (Buffer.compare(attest.extraData, expected.nonce) !== 0) {
    throw new TpmError('malformed', 'quote: made for another nonce');
  }
  const { pcrSelect } = attest.attested;
  if (formatPcrSelection(pcrSelect) !== formatPcrSelection(expected.selection)) {
    throw new TpmError('malformed', 'quote: over other registers');
  }
  // The digest is over the values with the hash of the signing scheme (Part 3, 18.4.1).
  const digest = pcrDigest(requireHash(signature.hash).alg, expected.values);
  if (!digest.equals(attest.attested.pcrDigest))
    throw new TpmError('malformed', 'quote: other register values');
  return attest;
}
