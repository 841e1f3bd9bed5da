import { createPublicKey, type KeyObject, sign } from 'node:crypto';
import { privateKeyFromSeed, rawBytesOf } from 'vtpm-proto';

/** What a TLS end shows and proves: PEM both. */
export interface TlsIdentity {
  readonly certificate: string;
  readonly privateKey: string;
  /** 32 bytes, Ed25519. */
  readonly publicKey: Buffer;
}

// DER (ITU-T X.690): identifier octets.
const INTEGER = 0x02;
const BIT_STRING = 0x03;
const OCTET_STRING = 0x04;
const UTF8_STRING = 0x0c;
const UTC_TIME = 0x17;
const GENERALIZED_TIME = 0x18;
const SEQUENCE = 0x30;
const SET = 0x31;
const EXPLICIT_0 = 0xa0;
const EXPLICIT_3 = 0xa3;
const BOOLEAN = 0x01;

/** AlgorithmIdentifier id-Ed25519, without parameters (RFC 8410 section 3). */
const ED25519 = Buffer.from('300506032b6570', 'hex');
/** id-at-commonName 2.5.4.3 and id-ce-keyUsage 2.5.29.15, each with its tag (RFC 5280 appendix A). */
const COMMON_NAME = Buffer.from('0603550403', 'hex');
const KEY_USAGE = Buffer.from('0603551d0f', 'hex');
/** KeyUsage digitalSignature (RFC 5280 section 4.2.1.3): one bit, seven unused. */
const DIGITAL_SIGNATURE = Buffer.from([BIT_STRING, 2, 7, 0x80]);
/** RFC 5280 section 4.1.2.5: it does not end. */
const NOT_BEFORE = '000101000000Z';
const NOT_AFTER = '99991231235959Z';
const NAME = 'vtpm.v1 peer';

/**
 * A self-signed certificate (RFC 5280 section 4.1, RFC 8410) of the key of a seed, the same each time: who reads it looks at
 * the key in it alone, so there is nothing to renew.
 * @param seed 32 bytes; the caller wipes it
 */
export function tlsIdentity(seed: Uint8Array): TlsIdentity {
  const key = privateKeyFromSeed(seed);
  const spki = createPublicKey(key).export({ format: 'der', type: 'spki' });
  return {
    certificate: pem(certificate(key, spki)),
    privateKey: key.export({ format: 'pem', type: 'pkcs8' }).toString(),
    publicKey: rawBytesOf(key),
  };
}

/** @param spki SubjectPublicKeyInfo of `key` */
function certificate(key: KeyObject, spki: Uint8Array): Buffer {
  const name = der(SEQUENCE, der(SET, der(SEQUENCE, COMMON_NAME, der(UTF8_STRING, Buffer.from(NAME)))));
  const usage = der(
    SEQUENCE,
    KEY_USAGE,
    der(BOOLEAN, Buffer.from([0xff])),
    der(OCTET_STRING, DIGITAL_SIGNATURE),
  );
  const toBeSigned = der(
    SEQUENCE,
    // v3: TLS 1.3 takes no other (RFC 8446 section 4.4.2).
    der(EXPLICIT_0, der(INTEGER, Buffer.from([2]))),
    der(INTEGER, Buffer.from([1])),
    ED25519,
    name,
    der(SEQUENCE, der(UTC_TIME, Buffer.from(NOT_BEFORE)), der(GENERALIZED_TIME, Buffer.from(NOT_AFTER))),
    name,
    spki,
    der(EXPLICIT_3, der(SEQUENCE, usage)),
  );
  const signature = sign(null, toBeSigned, key);
  return der(SEQUENCE, toBeSigned, ED25519, der(BIT_STRING, Buffer.from([0]), signature));
}

/** Identifier, length (X.690 section 8.1.3, the shortest form), contents. */
function der(tag: number, ...contents: readonly Uint8Array[]): Buffer {
  const body = Buffer.concat(contents);
  const { length } = body;
  const head = length < 0x80 ? [tag, length] : [tag, ...longLength(length)];
  return Buffer.concat([Buffer.from(head), body]);
}

function longLength(length: number): number[] {
  return length < 0x100 ? [0x81, length] : [0x82, length >> 8, length & 0xff];
}

/** RFC 7468. */
function pem(bytes: Buffer): string {
  const lines = bytes.toString('base64').match(/.{1,64}/g) ?? [];
  return ['-----BEGIN CERTIFICATE-----', ...lines, '-----END CERTIFICATE-----', ''].join('\n');
}
