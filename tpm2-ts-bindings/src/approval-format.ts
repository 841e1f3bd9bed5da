import type { KeyObject } from 'node:crypto';
import type { Approval, ApprovalRequest, ApprovalSignature } from './approval.js';
import { concat } from './bytes.js';
import { decode } from './codec.js';
import { Alg, NvAttribute } from './constants.js';
import { type NvEntity, nvEntity } from './entity.js';
import { TpmError } from './error.js';
import type { Signature } from './structures.js';
import { tpmsNvPublic } from './structures.js';

const MAX_TEXT = 2000;
/** The index type, bits 4 to 7 of TPMA_NV. */
const NV_TYPE = 0xf << 4;
const U64 = /^(0|[1-9]\d{0,19})$/;
const HEX = /^([0-9a-f]{2})+$/;

/** @throws TpmError `usage` */
export function checkRequest(json: unknown): ApprovalRequest {
  const what = 'approval request';
  const request = checkCommon<ApprovalRequest>(json, what);
  const { purpose, subject, counterPublic } = request;
  if (!isText(purpose) || !isHex(subject) || !isHex(counterPublic)) throw damaged(what);
  return request;
}

/** @throws TpmError `usage` */
export function checkApproval(json: unknown): Approval {
  const approval = checkCommon<Approval>(json, 'approval');
  const { scheme, base64 } = approval.signature ?? {};
  if (!['ecdsa', 'rsassa', 'rsapss'].includes(scheme) || !isText(base64)) throw damaged('approval');
  return approval;
}

function checkCommon<T extends Approval | ApprovalRequest>(json: unknown, what: string): T {
  if (typeof json !== 'object' || json === null) throw damaged(what);
  const { format, label, createdAt, pcrSelection, pcrs, counter, policyDigest } = json as Partial<T>;
  if (typeof format === 'number' && format > 1) {
    throw new TpmError('usage', `the ${what} has format ${format}, this version knows 1; upgrade`);
  }
  const isWhole =
    format === 1 &&
    isText(label) &&
    isText(createdAt) &&
    isText(pcrSelection) &&
    typeof pcrs === 'object' &&
    pcrs !== null &&
    Object.values(pcrs).every(isHex) &&
    typeof counter === 'string' &&
    U64.test(counter) &&
    BigInt(counter) < 1n << 64n &&
    isHex(policyDigest);
  if (!isWhole) throw damaged(what);
  return json as T;
}

function isText(value: unknown): value is string {
  return typeof value === 'string' && value.length <= MAX_TEXT;
}

function isHex(value: unknown): value is string {
  return isText(value) && HEX.test(value);
}

function damaged(what: string): TpmError {
  return new TpmError('usage', `this is no ${what}, or a damaged one`);
}

/** @throws TpmError `usage`, `malformed` */
export function readCounter(hex: string): NvEntity {
  const bytes = Buffer.from(hex, 'hex');
  const counter = nvEntity({ bytes, value: decode(tpmsNvPublic, bytes, 'counterPublic') });
  // What can be set to any value would bring revoked approvals back.
  if ((counter.nvPublic.value.attributes & NV_TYPE) !== NvAttribute.COUNTER) {
    throw new TpmError('usage', 'the NV index of the approval request is no counter');
  }
  return counter;
}

/** @throws TpmError `usage` for what is no key, or one that TPMs do not verify with */
export function authorityKey(load: () => KeyObject): KeyObject {
  let key: KeyObject;
  try {
    key = load();
  } catch (cause) {
    throw new TpmError('usage', 'this is no key in PEM that can be read without a password', { cause });
  }
  const { namedCurve, modulusLength, publicExponent } = key.asymmetricKeyDetails ?? {};
  const isFit =
    key.asymmetricKeyType === 'ec'
      ? namedCurve === 'prime256v1' || namedCurve === 'secp384r1'
      : key.asymmetricKeyType === 'rsa' &&
        (modulusLength === 2048 || modulusLength === 3072) &&
        publicExponent === 65537n;
  if (!isFit) {
    throw new TpmError('usage', 'an authority has a key on P-256 or P-384, or of RSA 2048 or 3072 bits');
  }
  return key;
}

export function fromTpmSignature(signature: Signature): ApprovalSignature {
  switch (signature.sigAlg) {
    case Alg.ECDSA:
      return {
        scheme: 'ecdsa',
        base64: concat(signature.signatureR, signature.signatureS).toString('base64'),
      };
    case Alg.RSASSA:
      return { scheme: 'rsassa', base64: signature.sig.toString('base64') };
    case Alg.RSAPSS:
      return { scheme: 'rsapss', base64: signature.sig.toString('base64') };
  }
}

export function toTpmSignature({ scheme, base64 }: ApprovalSignature): Signature {
  const bytes = Buffer.from(base64, 'base64');
  if (scheme !== 'ecdsa') {
    const sigAlg = scheme === 'rsapss' ? Alg.RSAPSS : Alg.RSASSA;
    return { sigAlg, hash: Alg.SHA256, sig: bytes };
  }
  const half = bytes.length / 2;
  return {
    sigAlg: Alg.ECDSA,
    hash: Alg.SHA256,
    signatureR: bytes.subarray(0, half),
    signatureS: bytes.subarray(half),
  };
}
