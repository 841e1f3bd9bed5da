import { createHash, createPrivateKey, createPublicKey, verify } from 'node:crypto';
import {
  authorityKey,
  checkApproval,
  checkRequest,
  fromTpmSignature,
  readCounter,
  toTpmSignature,
} from './approval-format.js';
import { encode, u64 } from './codec.js';
import { Alg, Eo, hashInfo } from './constants.js';
import { type NvEntity, withPassword } from './entity.js';
import { TpmError } from './error.js';
import { formatPcrSelection, parsePcrSelection, pcrDigest } from './pcr.js';
import { policyDigest } from './policy-digest.js';
import { approvalMessage, type PolicyStep } from './policy-step.js';
import { rsaPadding, signInSoftware, softwareKeyPublic } from './software-key.js';
import type { PcrSelection, PublicArea } from './structures.js';

/**
 * Platform states that a key outside of the TPM approves: PolicyAuthorize over PolicyPCR, then PolicyNV, which wants a
 * counter to stand where it stood. Counting on revokes every approval that was not made for the next value. Nothing here
 * needs a TPM, so that the key can be on a machine without one.
 */

/** Register values by `sha256:7`, each in hex. */
export type PcrValues = Readonly<Record<string, string>>;

/** What an authority is asked to sign, with all that the signature depends on. JSON. */
export interface ApprovalRequest {
  readonly format: 1;
  /** For people. Nothing proves it: a signature of this kind covers the policy and its reference only. */
  readonly label: string;
  /** ISO 8601; nothing proves it. */
  readonly createdAt: string;
  /** What is given out under the approval, and hex of whom it is for: an approval is of no use to another. */
  readonly purpose: string;
  readonly subject: string;
  /** `sha256:0,7` */
  readonly pcrSelection: string;
  readonly pcrs: PcrValues;
  /** The revocation counter's value for which the approval holds, decimal. */
  readonly counter: string;
  /** Hex of the TPMS_NV_PUBLIC of that counter. */
  readonly counterPublic: string;
  /** Hex: the approved policy. Follows from the above. */
  readonly policyDigest: string;
}

/** A signed approval. JSON. What is not in it, subject and counter's Name, the verifier has. */
export interface Approval {
  readonly format: 1;
  readonly label: string;
  readonly createdAt: string;
  readonly pcrSelection: string;
  readonly pcrs: PcrValues;
  readonly counter: string;
  readonly policyDigest: string;
  readonly signature: ApprovalSignature;
}

/** Over SHA-256. ECDSA: r and s one after the other, each of the curve's length. RSAPSS: salt of 32 bytes. */
export interface ApprovalSignature {
  readonly scheme: ApprovalScheme;
  readonly base64: string;
}

export type ApprovalScheme = 'ecdsa' | 'rsassa' | 'rsapss';

/** Where an approval belongs. */
export interface ApprovalScope {
  readonly purpose: string;
  /** Of any length; hex in the JSON. */
  readonly subject: Uint8Array;
  readonly counter: NvEntity;
}

/** 32 bytes that tie approvals to a purpose and a subject: SHA-256(purpose, 0, subject). */
export function approvalReference(purpose: string, subject: Uint8Array): Buffer {
  return createHash('sha256').update(purpose).update(Buffer.of(0)).update(subject).digest();
}

/**
 * An authority's public key as a TPM loads it, with no scheme of its own.
 * @param pem SPKI of P-256, P-384, RSA 2048 or RSA 3072 (a private key in PEM is taken for its public half)
 * @throws TpmError `usage`
 */
export function authorityPublic(pem: string): PublicArea {
  return softwareKeyPublic(
    authorityKey(() => createPublicKey(pem)),
    { use: 'sign' },
  );
}

/** The public half in SPKI form, whatever form it was given in. @throws TpmError `usage` */
export function authorityPem(pem: string): string {
  return authorityKey(() => createPublicKey(pem)).export({ type: 'spki', format: 'pem' }) as string;
}

/** Each selected register's name, `sha256:7`, in the order of selection. */
export function pcrNames(selection: PcrSelection): string[] {
  return selection.flatMap((bank) =>
    bank.pcrs.map((pcr) => formatPcrSelection([{ hash: bank.hash, pcrs: [pcr] }])),
  );
}

/** Names register values that `readPcrs` gave for the selection. */
export function namedPcrs(selection: PcrSelection, values: readonly Uint8Array[]): PcrValues {
  return Object.fromEntries(
    pcrNames(selection).map((name, at) => [name, Buffer.from(values[at] ?? []).toString('hex')]),
  );
}

/** The policy that an approval is of. @throws TpmError `usage` where a selected register has no value */
export function approvedPolicy(
  facts: Pick<Approval, 'pcrSelection' | 'pcrs' | 'counter'>,
  counter: NvEntity,
): readonly PolicyStep[] {
  const selection = parsePcrSelection(facts.pcrSelection);
  const values = selection.flatMap(({ hash, pcrs }) =>
    pcrs.map((pcr) => {
      const name = formatPcrSelection([{ hash, pcrs: [pcr] }]);
      const value = Buffer.from(facts.pcrs[name] ?? '', 'hex');
      if (value.length !== hashInfo(hash)?.size) {
        throw new TpmError('usage', `the approval has no value of PCR ${name}`);
      }
      return value;
    }),
  );
  return [
    { assert: 'pcr', selection, digest: pcrDigest(Alg.SHA256, values) },
    {
      assert: 'nv',
      index: counter,
      // Its empty authValue only reads.
      by: withPassword(counter),
      operand: encode(u64, BigInt(facts.counter)),
      operation: Eo.EQ,
    },
  ];
}

/** @throws TpmError `usage` */
export function approvalRequest(
  scope: ApprovalScope,
  facts: Pick<Approval, 'label' | 'createdAt' | 'pcrSelection' | 'pcrs'> & { readonly counter: bigint },
): ApprovalRequest {
  const { purpose, subject, counter } = scope;
  const names = pcrNames(parsePcrSelection(facts.pcrSelection));
  const request = {
    format: 1,
    label: facts.label,
    createdAt: facts.createdAt,
    purpose,
    subject: Buffer.from(subject).toString('hex'),
    pcrSelection: facts.pcrSelection,
    pcrs: Object.fromEntries(names.map((name) => [name, facts.pcrs[name] ?? ''])),
    counter: facts.counter.toString(),
    counterPublic: counter.nvPublic.bytes.toString('hex'),
  } as const;
  const digest = policyDigest(approvedPolicy(request, counter)).toString('hex');
  return readApprovalRequest({ ...request, policyDigest: digest });
}

/**
 * A request as it came from elsewhere. What is to be signed is computed from what it shows, never taken from it.
 * @throws TpmError `usage`
 */
export function readApprovalRequest(json: unknown): ApprovalRequest {
  const request = checkRequest(json);
  const counter = readCounter(request.counterPublic);
  const computed = policyDigest(approvedPolicy(request, counter)).toString('hex');
  if (computed !== request.policyDigest) {
    throw new TpmError('usage', 'the approval request shows other values than its policyDigest is of');
  }
  return request;
}

/**
 * Signs a request.
 * @param privateKeyPem PKCS #8 or the key type's own form, not encrypted
 * @param options.scheme for RSA keys; rsassa unless given
 * @throws TpmError `usage`
 */
export function signApproval(
  request: ApprovalRequest,
  privateKeyPem: string,
  options: { readonly scheme?: 'rsassa' | 'rsapss' } = {},
): Approval {
  const { label, createdAt, purpose, subject, pcrSelection, pcrs, counter } = readApprovalRequest(request);
  const key = authorityKey(() => createPrivateKey(privateKeyPem));
  const digest = Buffer.from(request.policyDigest, 'hex');
  const message = approvalMessage(digest, approvalReference(purpose, Buffer.from(subject, 'hex')));
  const signature = signInSoftware(key, message, Alg.SHA256, options.scheme);
  return {
    format: 1,
    label,
    createdAt,
    pcrSelection,
    pcrs,
    counter,
    policyDigest: request.policyDigest,
    signature: fromTpmSignature(signature),
  };
}

/** An approval as it came from elsewhere, not verified. @throws TpmError `usage` */
export function readApproval(json: unknown): Approval {
  return checkApproval(json);
}

/**
 * Whether the authority approved what the approval says, for this subject and counter. The TPM decides again.
 * @throws TpmError `usage` where the key is none
 */
export function verifyApproval(approval: Approval, authorityPem: string, scope: ApprovalScope): boolean {
  const key = authorityKey(() => createPublicKey(authorityPem));
  const isRsa = key.asymmetricKeyType === 'rsa';
  const { scheme, base64 } = approval.signature;
  if (isRsa === (scheme === 'ecdsa')) return false;
  try {
    const digest = policyDigest(approvedPolicy(approval, scope.counter));
    if (digest.toString('hex') !== approval.policyDigest) return false;
    const message = approvalMessage(digest, approvalReference(scope.purpose, scope.subject));
    const signature = Buffer.from(base64, 'base64');
    const how = scheme !== 'ecdsa' ? rsaPadding(scheme) : ({ dsaEncoding: 'ieee-p1363' } as const);
    return verify('sha256', message, { key, ...how }, signature);
  } catch (error) {
    if (error instanceof TpmError) return false;
    throw error;
  }
}

/** The step that satisfies a policy of the authority with this approval. */
export function authorizeStep(
  authority: PublicArea,
  scope: ApprovalScope,
  approval?: Approval,
): PolicyStep<'authorize'> {
  return {
    assert: 'authorize',
    signer: authority,
    policyRef: approvalReference(scope.purpose, scope.subject),
    ...(approval && {
      approved: {
        policy: approvedPolicy(approval, scope.counter),
        signature: toTpmSignature(approval.signature),
      },
    }),
  };
}
