import { ProtoError } from './error.js';

const UUID = /^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$/;

/** 16 bytes of a UUID in its text form (lower case, RFC 9562 section 4). @throws ProtoError `malformed` */
export function uuidToBytes(text: string): Buffer {
  if (!UUID.test(text)) throw new ProtoError('malformed', `"${text.slice(0, 64)}" is not a UUID`);
  return Buffer.from(text.replaceAll('-', ''), 'hex');
}

/** Text form of a UUID of 16 bytes. @throws ProtoError `malformed` */
export function uuidToText(bytes: Uint8Array): string {
  expectLength('uuid', bytes, 16);
  const hex = Buffer.from(bytes.buffer, bytes.byteOffset, 16).toString('hex');
  return `${hex.slice(0, 8)}-${hex.slice(8, 12)}-${hex.slice(12, 16)}-${hex.slice(16, 20)}-${hex.slice(20)}`;
}

/** @throws ProtoError `malformed` where `bytes` has another length */
export function expectLength(what: string, bytes: Uint8Array, length: number): void {
  if (bytes.length !== length)
    throw new ProtoError('malformed', `${what} has ${bytes.length} bytes, not ${length}`);
}

export function bytesEqual(a: Uint8Array, b: Uint8Array): boolean {
  return a.length === b.length && Buffer.compare(a, b) === 0;
}
