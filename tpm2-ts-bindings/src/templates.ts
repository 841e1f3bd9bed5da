import { ObjectAttribute as A, Alg, Curve } from './constants.js';
import { type PublicArea, publicArea } from './structures.js';

const AES_128_CFB = { algorithm: Alg.AES, keyBits: 128, mode: Alg.CFB } as const;
const NOTHING = Buffer.alloc(0);
/** Coordinates of zeros: what the TCG templates have in `unique` (EK Credential Profile, template L-2). */
const ZERO_POINT = { x: Buffer.alloc(32), y: Buffer.alloc(32) };

/**
 * The storage root key on P-256 as the TCG Provisioning Guidance, section 7.5.1, has it: the same bytes as other
 * software uses, so that they share one persistent key.
 */
export function srkTemplate(): PublicArea {
  return publicArea({
    type: Alg.ECC,
    nameAlg: Alg.SHA256,
    objectAttributes:
      A.fixedTPM | A.fixedParent | A.sensitiveDataOrigin | A.userWithAuth | A.noDA | A.restricted | A.decrypt,
    authPolicy: NOTHING,
    parameters: {
      symmetric: AES_128_CFB,
      scheme: { scheme: Alg.NULL },
      curveID: Curve.NIST_P256,
      kdf: { scheme: Alg.NULL },
    },
    unique: ZERO_POINT,
  });
}

/** A storage key of RSA 2048 bits with the same attributes. */
export function rsaSrkTemplate(): PublicArea {
  const ecc = srkTemplate().value;
  return publicArea({
    type: Alg.RSA,
    nameAlg: Alg.SHA256,
    objectAttributes: ecc.objectAttributes,
    authPolicy: NOTHING,
    parameters: { symmetric: AES_128_CFB, scheme: { scheme: Alg.NULL }, keyBits: 2048, exponent: 0 },
    unique: Buffer.alloc(256),
  });
}

/** An attestation key: P-256, ECDSA with SHA-256, restricted to what the TPM made itself. */
export function attestationKeyTemplate(): PublicArea {
  return publicArea({
    type: Alg.ECC,
    nameAlg: Alg.SHA256,
    objectAttributes:
      A.fixedTPM | A.fixedParent | A.sensitiveDataOrigin | A.userWithAuth | A.noDA | A.restricted | A.sign,
    authPolicy: NOTHING,
    parameters: {
      symmetric: { algorithm: Alg.NULL },
      scheme: { scheme: Alg.ECDSA, hashAlg: Alg.SHA256 },
      curveID: Curve.NIST_P256,
      kdf: { scheme: Alg.NULL },
    },
    unique: { x: NOTHING, y: NOTHING },
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
    parameters: { scheme: { scheme: Alg.NULL } },
    unique: NOTHING,
  });
}
