import { constants, type KeyObject, sign } from 'node:crypto';
import { concat } from './bytes.js';
import { ObjectAttribute as A, Alg, curveByJwk } from './constants.js';
import { digest, random, requireHash } from './crypto.js';
import { TpmError } from './error.js';
import { type PublicArea, publicArea, type Sensitive, type Signature } from './structures.js';

/** Keys and data made outside of a TPM, in its terms: for LoadExternal, Import and signed policies. */

const NOTHING = Buffer.alloc(0);
const AES_128_CFB = { algorithm: Alg.AES, keyBits: 128, mode: Alg.CFB } as const;

/** What a key made in software is for. */
export interface SoftwareKeyOptions {
  /** `sign`: a signing key of any scheme. `storage`: a parent that duplicates can go to. */
  readonly use: 'sign' | 'storage';
  readonly authPolicy?: Buffer;
  /** Alg.SHA256 unless given. */
  readonly nameAlg?: number;
}

/** The public area of a P-256, P-384, P-521 or RSA key of node:crypto. @throws TpmError `usage` for other keys */
export function softwareKeyPublic(key: KeyObject, options: SoftwareKeyOptions): PublicArea {
  const storage = options.use === 'storage';
  const head = {
    nameAlg: options.nameAlg ?? Alg.SHA256,
    objectAttributes: A.userWithAuth | (storage ? A.restricted | A.decrypt : A.sign),
    authPolicy: options.authPolicy ?? NOTHING,
  };
  const symmetric = storage ? AES_128_CFB : ({ algorithm: Alg.NULL } as const);
  const scheme = { scheme: Alg.NULL } as const;
  const jwk = key.export({ format: 'jwk' });
  const curveID = curveByJwk(jwk.crv)?.curveID;
  if (jwk.kty === 'EC' && curveID !== undefined) {
    return publicArea({
      type: Alg.ECC,
      ...head,
      parameters: { symmetric, scheme, curveID, kdf: { scheme: Alg.NULL } },
      unique: { x: part(jwk.x), y: part(jwk.y) },
    });
  }
  if (jwk.kty !== 'RSA')
    throw new TpmError('usage', 'only P-256, P-384, P-521 and RSA keys have a public area here');
  const unique = part(jwk.n);
  const e = part(jwk.e);
  const exponent = e.readUIntBE(0, Math.min(e.length, 6));
  return publicArea({
    type: Alg.RSA,
    ...head,
    // 0 stands for 2^16 + 1 (Part 2, TPMS_RSA_PARMS).
    parameters: {
      symmetric,
      scheme,
      keyBits: unique.length * 8,
      exponent: exponent === 65537 ? 0 : exponent,
    },
    unique,
  });
}

/**
 * The private part of such a key.
 * @param options `storage`: with a seed for the children's wrapping, which a parent needs (Part 2, TPMT_SENSITIVE)
 */
export function softwareKeySensitive(
  key: KeyObject,
  options: { readonly authValue?: Buffer; readonly storage?: boolean } = {},
): Sensitive {
  const jwk = key.export({ format: 'jwk' });
  return {
    sensitiveType: jwk.kty === 'EC' ? Alg.ECC : Alg.RSA,
    authValue: options.authValue ?? NOTHING,
    seedValue: options.storage === true ? random(32) : NOTHING,
    // An RSA private key is one of its primes.
    sensitive: part(jwk.kty === 'EC' ? jwk.d : jwk.p),
  };
}

/** Data to import as a sealed object. Its public area commits to it through a random seed. */
export function softwareSealed(
  data: Buffer,
  options: {
    readonly authPolicy?: Buffer;
    readonly authValue?: Buffer;
    readonly nameAlg?: number;
    readonly objectAttributes?: number;
  } = {},
): { objectPublic: PublicArea; sensitive: Sensitive } {
  const hash = requireHash(options.nameAlg ?? Alg.SHA256);
  const seedValue = random(hash.size);
  return {
    objectPublic: publicArea({
      type: Alg.KEYEDHASH,
      nameAlg: hash.alg,
      objectAttributes:
        options.objectAttributes ?? (options.authPolicy === undefined ? A.userWithAuth : 0) | A.noDA,
      authPolicy: options.authPolicy ?? NOTHING,
      parameters: { scheme: { scheme: Alg.NULL } },
      unique: digest(hash, seedValue, data),
    }),
    sensitive: {
      sensitiveType: Alg.KEYEDHASH,
      authValue: options.authValue ?? NOTHING,
      seedValue,
      sensitive: concat(data),
    },
  };
}

/** How node:crypto pads for a scheme of RSA. RSAPSS with a salt as long as the digest, which every TPM takes. */
export function rsaPadding(scheme: 'rsassa' | 'rsapss'): { padding: number; saltLength?: number } {
  return scheme === 'rsapss'
    ? { padding: constants.RSA_PKCS1_PSS_PADDING, saltLength: constants.RSA_PSS_SALTLEN_DIGEST }
    : { padding: constants.RSA_PKCS1_PADDING };
}

/**
 * Signs with ECDSA or RSA.
 * @param hashAlg for `authorize` steps the signer's nameAlg
 * @param scheme for RSA keys
 */
export function signInSoftware(
  key: KeyObject,
  message: Uint8Array,
  hashAlg: number = Alg.SHA256,
  scheme: 'rsassa' | 'rsapss' = 'rsassa',
): Signature {
  const { name } = requireHash(hashAlg);
  if (key.asymmetricKeyType === 'rsa') {
    const sigAlg = scheme === 'rsapss' ? Alg.RSAPSS : Alg.RSASSA;
    return { sigAlg, hash: hashAlg, sig: concat(sign(name, message, { key, ...rsaPadding(scheme) })) };
  }
  const rs = sign(name, message, { key, dsaEncoding: 'ieee-p1363' });
  const half = rs.length / 2;
  return {
    sigAlg: Alg.ECDSA,
    hash: hashAlg,
    signatureR: concat(rs.subarray(0, half)),
    signatureS: concat(rs.subarray(half)),
  };
}

function part(text: string | undefined): Buffer {
  if (text === undefined) throw new TpmError('usage', 'the key does not have the part that is needed');
  return concat(Buffer.from(text, 'base64url'));
}
