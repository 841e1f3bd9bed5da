import { ObjectAttribute as A, Alg, Curve } from './constants.js';
import {
  type EndorsementKeyName,
  endorsementKeyKind,
  endorsementPolicy,
  isLowRange,
} from './endorsement-key.js';
import { policyDigest } from './policy-digest.js';
import { type Public, type PublicArea, publicArea } from './structures.js';

const NOTHING = Buffer.alloc(0);
const NO_SCHEME = { scheme: Alg.NULL } as const;
const NO_SYMMETRIC = { algorithm: Alg.NULL } as const;
const MADE_HERE = A.fixedTPM | A.fixedParent | A.sensitiveDataOrigin;

/**
 * An endorsement key, byte by byte as the EK Credential Profile, annex B, has it: made in the endorsement hierarchy,
 * it is the key that the TPM's certificate is for. `endorsementPolicy` authorises its use.
 */
export function endorsementKeyTemplate(name: EndorsementKeyName): PublicArea {
  const { nameAlg } = endorsementKeyKind(name);
  const userWithAuth = isLowRange(name) ? 0 : A.userWithAuth;
  return storageTemplate(name, {
    objectAttributes: MADE_HERE | userWithAuth | A.adminWithPolicy | A.restricted | A.decrypt,
    authPolicy: policyDigest(endorsementPolicy(name), nameAlg),
  });
}

/**
 * The storage root key as the TCG Provisioning Guidance, section 7.5.1, has it: an EK template without the policy.
 * The same bytes as other software uses, so that they share one persistent key.
 * @param name whose algorithms and `unique` it takes
 */
export function srkTemplate(name: EndorsementKeyName = 'L-2'): PublicArea {
  return storageTemplate(name, {
    objectAttributes: MADE_HERE | A.userWithAuth | A.noDA | A.restricted | A.decrypt,
    authPolicy: NOTHING,
  });
}

/** A storage root key of RSA 2048 bits. */
export function rsaSrkTemplate(): PublicArea {
  return srkTemplate('L-1');
}

/**
 * A storage key under another one, which has to have the same nameAlg and symmetric algorithm (Part 3, 12.1). Unlike
 * a root key it counts wrong authValues, so that a password may protect it.
 * @param name whose algorithms it takes
 */
export function storageKeyTemplate(name: Exclude<EndorsementKeyName, 'L-1' | 'L-2'> = 'H-2'): PublicArea {
  return storageTemplate(name, {
    objectAttributes: MADE_HERE | A.userWithAuth | A.restricted | A.decrypt,
    authPolicy: NOTHING,
  });
}

function storageTemplate(
  name: EndorsementKeyName,
  policy: Pick<Public, 'objectAttributes' | 'authPolicy'>,
): PublicArea {
  const { key, nameAlg, symmetricBits } = endorsementKeyKind(name);
  const head = { nameAlg, ...policy };
  const common = {
    symmetric: { algorithm: Alg.AES, keyBits: symmetricBits, mode: Alg.CFB },
    scheme: NO_SCHEME,
  } as const;
  const zeros = (size: number): Buffer => Buffer.alloc(isLowRange(name) ? size : 0);
  if (key.type === Alg.RSA) {
    return publicArea({
      ...head,
      type: key.type,
      parameters: { ...common, keyBits: key.keyBits, exponent: 0 },
      unique: zeros(key.keyBits / 8),
    });
  }
  return publicArea({
    ...head,
    type: key.type,
    parameters: { ...common, curveID: key.curveID, kdf: NO_SCHEME },
    // Of the low range only P-256 is on a curve.
    unique: { x: zeros(32), y: zeros(32) },
  });
}

/** True where a key is of this template in all but its own `unique`: no attribute, algorithm or policy is another. */
export function isMadeFrom({ bytes, value }: PublicArea, { value: template }: PublicArea): boolean {
  if (value.type === Alg.ECC && template.type === Alg.ECC) {
    return publicArea({ ...template, unique: value.unique }).bytes.equals(bytes);
  }
  if (value.type === Alg.RSA && template.type === Alg.RSA) {
    return publicArea({ ...template, unique: value.unique }).bytes.equals(bytes);
  }
  return false;
}

/** Signature algorithm and size; the hash is the usual one for that size. */
export type SigningKeyName = 'ecdsa-p256' | 'ecdsa-p384' | 'rsassa-2048' | 'rsapss-2048';

/** An attestation key: restricted to what the TPM made itself. It signs with its own scheme alone. */
export function attestationKeyTemplate(name: SigningKeyName = 'ecdsa-p256'): PublicArea {
  return signingTemplate(name, MADE_HERE | A.userWithAuth | A.noDA | A.restricted | A.sign);
}

/** A key that signs any digest, with its own scheme alone. It counts wrong authValues. */
export function signingKeyTemplate(name: SigningKeyName = 'ecdsa-p256'): PublicArea {
  return signingTemplate(name, MADE_HERE | A.userWithAuth | A.sign);
}

function signingTemplate(name: SigningKeyName, objectAttributes: number): PublicArea {
  const hashAlg = name === 'ecdsa-p384' ? Alg.SHA384 : Alg.SHA256;
  const head = { nameAlg: hashAlg, objectAttributes, authPolicy: NOTHING };
  if (name === 'rsassa-2048' || name === 'rsapss-2048') {
    const scheme = name === 'rsassa-2048' ? Alg.RSASSA : Alg.RSAPSS;
    return publicArea({
      ...head,
      type: Alg.RSA,
      parameters: { symmetric: NO_SYMMETRIC, scheme: { scheme, hashAlg }, keyBits: 2048, exponent: 0 },
      unique: NOTHING,
    });
  }
  return publicArea({
    ...head,
    type: Alg.ECC,
    parameters: {
      symmetric: NO_SYMMETRIC,
      scheme: { scheme: Alg.ECDSA, hashAlg },
      curveID: name === 'ecdsa-p384' ? Curve.NIST_P384 : Curve.NIST_P256,
      kdf: NO_SCHEME,
    },
    unique: { x: NOTHING, y: NOTHING },
  });
}

/**
 * A P-256 key for key agreement (ECDH_ZGen), under `authPolicy` alone: userWithAuth is clear, so the authValue opens
 * nothing. No saved context of it outlives a TPM Reset or Restart.
 * @param unique 32 bytes each, random for another key than any before: a primary key follows from its template
 */
export function agreementKeyTemplate(
  authPolicy: Buffer,
  unique: { readonly x: Buffer; readonly y: Buffer } = { x: NOTHING, y: NOTHING },
): PublicArea {
  return publicArea({
    type: Alg.ECC,
    nameAlg: Alg.SHA256,
    objectAttributes: MADE_HERE | A.stClear | A.noDA | A.decrypt,
    authPolicy,
    parameters: {
      symmetric: NO_SYMMETRIC,
      scheme: { scheme: Alg.ECDH, hashAlg: Alg.SHA256 },
      curveID: Curve.NIST_P256,
      kdf: NO_SCHEME,
    },
    unique,
  });
}

/**
 * Data that only `authPolicy` gives out: userWithAuth is clear, so the authValue opens nothing, and adminWithPolicy is
 * set, so it changes nothing either.
 */
export function sealedTemplate(authPolicy: Buffer): PublicArea {
  return publicArea({
    type: Alg.KEYEDHASH,
    nameAlg: Alg.SHA256,
    objectAttributes: A.fixedTPM | A.fixedParent | A.adminWithPolicy | A.noDA,
    authPolicy,
    parameters: { scheme: NO_SCHEME },
    unique: NOTHING,
  });
}
