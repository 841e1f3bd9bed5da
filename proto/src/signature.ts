import { verify } from 'node:crypto';
import { ProtoError } from './error.js';
import { rawPublicKey } from './raw-key.js';

/** Ed25519 (RFC 8032). @param publicKey 32 bytes */
export function verifySignature(publicKey: Uint8Array, message: Uint8Array, signature: Uint8Array): boolean {
  return verify(null, message, rawPublicKey('Ed25519', publicKey), signature);
}

/** @throws ProtoError `forged` */
export function checkSignature(
  what: string,
  publicKey: Uint8Array,
  domain: Uint8Array,
  message: Uint8Array,
  signature: Uint8Array,
): void {
  if (!verifySignature(publicKey, Buffer.concat([domain, message]), signature)) {
    throw new ProtoError('forged', `the ${what}'s signature does not verify`);
  }
}

/** @throws ProtoError `newer-format`, `malformed` */
export function checkFormat(what: string, format: number, known: number): void {
  if (format > known) {
    throw new ProtoError(
      'newer-format',
      `the ${what} has format ${format}, this version knows ${known}; upgrade this side`,
    );
  }
  if (format !== known) throw new ProtoError('malformed', `the ${what} has format ${format}`);
}
