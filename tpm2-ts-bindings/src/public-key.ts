import { createPublicKey, type JsonWebKey, type KeyObject } from 'node:crypto';
import { leftPad, u32Bytes } from './bytes.js';
import { Alg, curveInfo } from './constants.js';
import { TpmError } from './error.js';
import type { Public } from './structures.js';

/**
 * The public key as node:crypto takes it.
 * @throws TpmError `usage` for a type it cannot be; `malformed` for a point that is not on its curve, or an RSA key that
 * is none
 */
export function publicKeyObject(key: Public): KeyObject {
  if (key.type === Alg.ECC) {
    const curve = curveInfo(key.parameters.curveID);
    if (curve !== undefined) {
      const coordinate = (value: Uint8Array) => leftPad(value, curve.size).toString('base64url');
      return fromJwk({
        kty: 'EC',
        crv: curve.jwk,
        x: coordinate(key.unique.x),
        y: coordinate(key.unique.y),
      });
    }
  }
  if (key.type === Alg.RSA) {
    // Exponent 0 stands for 2^16 + 1 (Part 2, TPMS_RSA_PARMS).
    const exponent = u32Bytes(key.parameters.exponent || 65537);
    return fromJwk({
      kty: 'RSA',
      n: key.unique.toString('base64url'),
      e: exponent.toString('base64url'),
    });
  }
  throw new TpmError('usage', 'this public area holds no key that node:crypto knows');
}

function fromJwk(key: JsonWebKey): KeyObject {
  try {
    return createPublicKey({ key, format: 'jwk' });
  } catch (cause) {
    throw new TpmError('malformed', 'this public area holds no valid key', { cause });
  }
}
