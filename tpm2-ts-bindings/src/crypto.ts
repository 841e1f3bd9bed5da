import {
  constants,
  createCipheriv,
  createDecipheriv,
  createECDH,
  createHash,
  createHmac,
  diffieHellman,
  type KeyObject,
  privateDecrypt,
  publicEncrypt,
  randomFillSync,
} from 'node:crypto';
import { concat, leftPad, u16Bytes, u32Bytes, wipe } from './bytes.js';
import { decode, encode } from './codec.js';
import { Alg, type CurveInfo, curveInfo, type HashInfo, hashInfo } from './constants.js';
import { TpmError } from './error.js';
import { publicKeyObject } from './public-key.js';
import { type Public, tpmsEccPoint } from './structures.js';

/** The key derivations and encryptions of Part 1, "Cryptography Subsystem" and its annexes B and C. */

export function requireHash(alg: number): HashInfo {
  const hash = hashInfo(alg);
  if (hash === undefined)
    throw new TpmError('usage', `hash algorithm 0x${alg.toString(16)} is not supported`);
  return hash;
}

export function digest(hash: HashInfo, ...parts: readonly Uint8Array[]): Buffer {
  const state = createHash(hash.name);
  for (const part of parts) state.update(part);
  return state.digest();
}

export function hmac(hash: HashInfo, key: Uint8Array, ...parts: readonly Uint8Array[]): Buffer {
  const state = createHmac(hash.name, key);
  for (const part of parts) state.update(part);
  return state.digest();
}

/** Random bytes in memory of their own. */
export function random(size: number): Buffer {
  return randomFillSync(Buffer.alloc(size));
}

const ZERO = new Uint8Array(1);

/** KDFa: SP 800-108 in counter mode with HMAC (Part 1, "KDFa()"). @returns `bits`, with zeros before them to whole bytes */
export function kdfa(
  hash: HashInfo,
  key: Uint8Array,
  label: string,
  contextU: Uint8Array,
  contextV: Uint8Array,
  bits: number,
): Buffer {
  const fixed = [Buffer.from(label), ZERO, contextU, contextV, u32Bytes(bits)];
  return expand(hash, bits, (counter) => hmac(hash, key, counter, ...fixed));
}

/** KDFe: SP 800-56A with a hash (Part 1, "KDFe for ECDH"). @returns `bits`, with zeros before them to whole bytes */
export function kdfe(
  hash: HashInfo,
  z: Uint8Array,
  label: string,
  partyU: Uint8Array,
  partyV: Uint8Array,
  bits: number,
): Buffer {
  const fixed = [Buffer.from(label), ZERO, partyU, partyV];
  return expand(hash, bits, (counter) => digest(hash, counter, z, ...fixed));
}

function expand(hash: HashInfo, bits: number, block: (counter: Buffer) => Buffer): Buffer {
  const out = Buffer.alloc(Math.ceil(bits / 8));
  for (let counter = 1, at = 0; at < out.length; counter++, at += hash.size) {
    const bytes = block(u32Bytes(counter));
    out.set(bytes.subarray(0, out.length - at), at);
    wipe(bytes);
  }
  if (bits % 8 !== 0) out[0] = (out[0] ?? 0) & (0xff >>> (8 - (bits % 8)));
  return out;
}

/**
 * AES in CFB mode, for parameters (Part 1, "Session-Based Encryption") and wrapped objects. @param key of 16, 24 or 32
 * bytes
 */
export function cfb(
  direction: 'encrypt' | 'decrypt',
  key: Uint8Array,
  iv: Uint8Array,
  data: Uint8Array,
): Buffer {
  const make = direction === 'encrypt' ? createCipheriv : createDecipheriv;
  const state = make(`aes-${key.length * 8}-cfb`, key, iv);
  const body = state.update(data);
  const out = concat(body, state.final());
  wipe(body);
  return out;
}

/** True where `encapsulate` works with this key. */
export function canEncapsulate(key: Public): boolean {
  if (hashInfo(key.nameAlg) === undefined) return false;
  if (key.type === Alg.ECC) return curveInfo(key.parameters.curveID) !== undefined;
  return key.type === Alg.RSA && key.parameters.keyBits >= 2048;
}

/**
 * A fresh secret that only the TPM holding the key can read, with the bytes to send for it (Part 1, annexes B and C,
 * "Secret Sharing").
 * @param label SECRET for a session's salt, IDENTITY for credentials, DUPLICATE for import
 * @returns a secret of the size of the key's nameAlg; the content of a TPM2B_ENCRYPTED_SECRET
 */
export function encapsulate(key: Public, label: string): { secret: Buffer; encrypted: Buffer } {
  const hash = requireHash(key.nameAlg);
  if (key.type === Alg.RSA) {
    const secret = random(hash.size);
    const encrypted = checked('usage', () =>
      publicEncrypt({ key: publicKeyObject(key), ...oaep(hash, label) }, secret),
    );
    return { secret, encrypted };
  }
  if (key.type !== Alg.ECC) throw new TpmError('usage', 'only ECC and RSA keys can receive a secret');
  const curve = requireCurve(key.parameters.curveID);
  const x = leftPad(key.unique.x, curve.size);
  const ephemeral = createECDH(curve.name);
  const own = ephemeral.generateKeys();
  const ownX = own.subarray(1, 1 + curve.size);
  // computeSecret refuses a point that is not on the curve.
  const z = checked('usage', () =>
    ephemeral.computeSecret(concat(Buffer.of(4), x, leftPad(key.unique.y, curve.size))),
  );
  const secret = kdfe(hash, z, label, ownX, x, hash.size * 8);
  wipe(z);
  return {
    secret,
    encrypted: encode(tpmsEccPoint, { x: Buffer.from(ownX), y: Buffer.from(own.subarray(1 + curve.size)) }),
  };
}

/**
 * The secret of `encapsulate`, for who holds the private key in software.
 * @throws TpmError `malformed` where the bytes are not for this key and label, `usage` for a key that receives no secrets
 */
export function decapsulate(key: Public, privateKey: KeyObject, label: string, encrypted: Buffer): Buffer {
  const hash = requireHash(key.nameAlg);
  if (key.type === Alg.RSA) {
    return checked('malformed', () => privateDecrypt({ key: privateKey, ...oaep(hash, label) }, encrypted));
  }
  if (key.type !== Alg.ECC) throw new TpmError('usage', 'only ECC and RSA keys can receive a secret');
  const size = requireCurve(key.parameters.curveID).size;
  const point = decode(tpmsEccPoint, encrypted, 'encrypted secret');
  const z = checked('malformed', () =>
    diffieHellman({ privateKey, publicKey: publicKeyObject({ ...key, unique: point }) }),
  );
  try {
    return kdfe(hash, z, label, leftPad(point.x, size), leftPad(key.unique.x, size), hash.size * 8);
  } finally {
    wipe(z);
  }
}

/** Labels end with a zero byte (Part 1, annex B, "RSAES_OAEP"). */
function oaep(hash: HashInfo, label: string) {
  return {
    padding: constants.RSA_PKCS1_OAEP_PADDING,
    oaepHash: hash.name,
    oaepLabel: Buffer.from(`${label}\0`),
  };
}

/** Points that are not on their curve and bytes that do not decrypt come from outside: a typed error. */
function checked<T>(code: 'usage' | 'malformed', body: () => T): T {
  try {
    return body();
  } catch (error) {
    if (error instanceof TpmError) throw error;
    const message = 'the key is no valid one, or the encrypted secret is for another key';
    throw new TpmError(code, message, { cause: error });
  }
}

function requireCurve(curveID: number): CurveInfo {
  const curve = curveInfo(curveID);
  if (curve === undefined) throw new TpmError('usage', `curve 0x${curveID.toString(16)} is not supported`);
  return curve;
}

/** nameAlg and the digest of the public area (Part 1, "Names"). */
export function nameOf(nameAlg: number, bytes: Uint8Array): Buffer {
  return concat(u16Bytes(nameAlg), digest(requireHash(nameAlg), bytes));
}
