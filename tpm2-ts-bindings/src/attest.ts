import { constants, verify } from 'node:crypto';
import { leftPad } from './bytes.js';
import { struct, tagged, tpm2b, u16, u32, u64, type ValueOf, yesNo } from './codec.js';
import { Alg, curveInfo, hashInfo, St } from './constants.js';
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
  tpmsTimeInfo,
} from './structures.js';
import { Reader } from './wire.js';

/**
 * What a TPM says and signs (Part 2, "Attestation Structures"), checked with node:crypto alone: the verifier needs no
 * TPM.
 */

/** TPM_GENERATED_VALUE: a restricted key signs nothing from outside that starts with it. */
const MAGIC = 0xff544347;

const head = { qualifiedSigner: tpm2b, extraData: tpm2b, clockInfo: tpmsClockInfo, firmwareVersion: u64 };

/** TPMS_ATTEST without its magic. */
export const tpmsAttest = tagged('type', u16, {
  [St.ATTEST_QUOTE]: struct({ ...head, attested: struct({ pcrSelect: tpmlPcrSelection, pcrDigest: tpm2b }) }),
  [St.ATTEST_CERTIFY]: struct({ ...head, attested: struct({ name: tpm2b, qualifiedName: tpm2b }) }),
  [St.ATTEST_CREATION]: struct({ ...head, attested: struct({ objectName: tpm2b, creationHash: tpm2b }) }),
  [St.ATTEST_NV]: struct({
    ...head,
    attested: struct({ indexName: tpm2b, offset: u16, nvContents: tpm2b }),
  }),
  [St.ATTEST_SESSION_AUDIT]: struct({
    ...head,
    attested: struct({ exclusiveSession: yesNo, sessionDigest: tpm2b }),
  }),
  [St.ATTEST_COMMAND_AUDIT]: struct({
    ...head,
    attested: struct({ auditCounter: u64, digestAlg: u16, auditDigest: tpm2b, commandDigest: tpm2b }),
  }),
  [St.ATTEST_TIME]: struct({ ...head, attested: struct({ time: tpmsTimeInfo, firmwareVersion: u64 }) }),
});
export type Attest = ValueOf<typeof tpmsAttest>;
/** Statements of one type (`St`). */
export type AttestOf<T extends Attest['type']> = Extract<Attest, { readonly type: T }>;

/** @param bytes as the TPM gave them. @throws TpmError `malformed` */
export function parseAttest(bytes: Uint8Array): Attest {
  const reader = new Reader(bytes, 'attestation');
  if (u32.read(reader) !== MAGIC) throw new TpmError('malformed', 'attestation: not made by a TPM');
  const attest = tpmsAttest.read(reader);
  reader.end();
  return attest;
}

/**
 * True where `signature` is over `message` by `key`. Unknown combinations, and keys that sign nothing, are false.
 * @throws TpmError `malformed` for a public area that holds no valid key
 */
export function verifySignature(key: Public, message: Uint8Array, signature: Signature): boolean {
  const hash = hashInfo(signature.hash);
  if (hash === undefined) return false;
  if (signature.sigAlg === Alg.ECDSA) {
    const size = key.type === Alg.ECC ? curveInfo(key.parameters.curveID)?.size : undefined;
    if (size === undefined) return false;
    const rs = Buffer.concat([leftPad(signature.signatureR, size), leftPad(signature.signatureS, size)]);
    return verify(hash.name, message, { key: publicKeyObject(key), dsaEncoding: 'ieee-p1363' }, rs);
  }
  if (key.type !== Alg.RSA) return false;
  return verify(
    hash.name,
    message,
    {
      key: publicKeyObject(key),
      padding:
        signature.sigAlg === Alg.RSASSA ? constants.RSA_PKCS1_PADDING : constants.RSA_PKCS1_PSS_PADDING,
    },
    signature.sig,
  );
}

/** What every verifier expects. */
export interface ExpectedAttest {
  readonly key: Public;
  /** The nonce the statement was asked with (qualifyingData). */
  readonly nonce: Uint8Array;
}

/**
 * Checks who signed a statement, for which nonce and of which type it is. What it says is for the caller to compare.
 * Key and signature prove a TPM only where the key is restricted, and known by more than its own word.
 * @param type `St.ATTEST_…`
 * @param bytes as the TPM gave them
 * @throws TpmError `malformed` with what does not fit
 */
export function verifyAttest<T extends Attest['type']>(
  type: T,
  bytes: Buffer,
  signature: Signature,
  expected: ExpectedAttest,
): AttestOf<T> {
  const what = WHAT[type];
  if (!verifySignature(expected.key, bytes, signature)) refuse(what, 'the signature does not verify');
  const attest = parseAttest(bytes);
  if (!isOf(type, attest)) return refuse(what, 'signed for something else');
  if (Buffer.compare(attest.extraData, expected.nonce) !== 0) refuse(what, 'made for another nonce');
  return attest;
}

const WHAT: Readonly<Record<Attest['type'], string>> = {
  [St.ATTEST_QUOTE]: 'quote',
  [St.ATTEST_CERTIFY]: 'certification',
  [St.ATTEST_CREATION]: 'creation',
  [St.ATTEST_NV]: 'NV content',
  [St.ATTEST_SESSION_AUDIT]: 'session audit',
  [St.ATTEST_COMMAND_AUDIT]: 'command audit',
  [St.ATTEST_TIME]: 'time',
};

function isOf<T extends Attest['type']>(type: T, attest: Attest): attest is AttestOf<T> {
  return attest.type === type;
}

function refuse(what: string, why: string): never {
  throw new TpmError('malformed', `${what}: ${why}`);
}

/** What the verifier of a quote expects. */
export interface ExpectedQuote extends ExpectedAttest {
  readonly selection: PcrSelection;
  /** Values of the registers in the order of selection. */
  readonly values: readonly Buffer[];
}

/**
 * Checks a quote: signature, nonce, selection and register values.
 * @throws TpmError `malformed` with what does not fit
 */
export function verifyQuote(
  quoted: Buffer,
  signature: Signature,
  expected: ExpectedQuote,
): AttestOf<typeof St.ATTEST_QUOTE> {
  const attest = verifyAttest(St.ATTEST_QUOTE, quoted, signature, expected);
  const { pcrSelect } = attest.attested;
  if (formatPcrSelection(pcrSelect) !== formatPcrSelection(expected.selection)) {
    refuse('quote', 'over other registers');
  }
  // The digest is over the values with the hash of the signing scheme (Part 3, Quote).
  const digest = pcrDigest(requireHash(signature.hash).alg, expected.values);
  if (!digest.equals(attest.attested.pcrDigest)) refuse('quote', 'other register values');
  return attest;
}

/** Checks what Certify says: the object with this Name is in the TPM. @throws TpmError `malformed` */
export function verifyCertify(
  certifyInfo: Buffer,
  signature: Signature,
  expected: ExpectedAttest & { readonly name: Buffer },
): AttestOf<typeof St.ATTEST_CERTIFY> {
  const attest = verifyAttest(St.ATTEST_CERTIFY, certifyInfo, signature, expected);
  if (!attest.attested.name.equals(expected.name)) refuse('certification', 'of another object');
  return attest;
}

/**
 * Checks what CertifyCreation says. @param expected with creationHash, the hash over creationData @throws TpmError
 * `malformed`
 */
export function verifyCertifyCreation(
  certifyInfo: Buffer,
  signature: Signature,
  expected: ExpectedAttest & { readonly name: Buffer; readonly creationHash: Buffer },
): AttestOf<typeof St.ATTEST_CREATION> {
  const attest = verifyAttest(St.ATTEST_CREATION, certifyInfo, signature, expected);
  if (!attest.attested.objectName.equals(expected.name)) refuse('creation', 'of another object');
  if (!attest.attested.creationHash.equals(expected.creationHash)) refuse('creation', 'with other data');
  return attest;
}

/** Checks what NV_Certify says; the content is in `attested.nvContents`. @throws TpmError `malformed` */
export function verifyNvCertify(
  certifyInfo: Buffer,
  signature: Signature,
  expected: ExpectedAttest & { readonly name: Buffer; readonly offset?: number },
): AttestOf<typeof St.ATTEST_NV> {
  const attest = verifyAttest(St.ATTEST_NV, certifyInfo, signature, expected);
  if (!attest.attested.indexName.equals(expected.name)) refuse('NV content', 'of another index');
  if (attest.attested.offset !== (expected.offset ?? 0)) refuse('NV content', 'from another offset');
  return attest;
}

/**
 * Checks what GetSessionAuditDigest says: the session saw these commands with these answers, in this order.
 * @param expected with the digest (`Session.auditDigest` or an `AuditDigest`); `exclusive` where the TPM must have run
 * nothing else in between
 * @throws TpmError `malformed`
 */
export function verifySessionAudit(
  auditInfo: Buffer,
  signature: Signature,
  expected: ExpectedAttest & { readonly digest: Buffer; readonly exclusive?: boolean },
): AttestOf<typeof St.ATTEST_SESSION_AUDIT> {
  const attest = verifyAttest(St.ATTEST_SESSION_AUDIT, auditInfo, signature, expected);
  const { sessionDigest, exclusiveSession } = attest.attested;
  if (!sessionDigest.equals(expected.digest)) refuse('session audit', 'of other commands or answers');
  if (expected.exclusive === true && !exclusiveSession) refuse('session audit', 'not exclusive');
  return attest;
}

/**
 * Checks what GetCommandAuditDigest says: since the audit began, the TPM ran these of the audited commands.
 * @param expected with the digest (`AuditDigest`), the audit's hash, and `auditedCommands` with that hash
 * @throws TpmError `malformed`
 */
export function verifyCommandAudit(
  auditInfo: Buffer,
  signature: Signature,
  expected: ExpectedAttest & {
    readonly digest: Buffer;
    readonly digestAlg: number;
    readonly commandDigest: Buffer;
  },
): AttestOf<typeof St.ATTEST_COMMAND_AUDIT> {
  const attest = verifyAttest(St.ATTEST_COMMAND_AUDIT, auditInfo, signature, expected);
  const { auditDigest, digestAlg, commandDigest } = attest.attested;
  if (digestAlg !== expected.digestAlg) refuse('command audit', 'with another hash');
  if (!commandDigest.equals(expected.commandDigest)) refuse('command audit', 'other commands are audited');
  if (!auditDigest.equals(expected.digest)) refuse('command audit', 'of other commands or answers');
  return attest;
}
