import { hash } from 'node:crypto';
import { expectLength, type PeerMessage, type PeerMessageType } from 'vtpm-proto';

const DOMAIN = Buffer.from('vtpm.v1 migration transcript\0');

/** Types in a fixed-length encoding of their own, so that no text of one runs into what follows. */
const NUMBER: Readonly<Record<PeerMessageType, number>> = {
  HELLO: 1,
  OFFER: 2,
  EVIDENCE: 3,
  SECRET: 4,
  READY: 5,
  STATE: 6,
  DECISION: 7,
  SETTLED: 8,
  INQUIRE: 9,
  REFUSED: 10,
  RESCUED: 11,
  UNSETTLED: 12,
};

/**
 * Everything both ends have said, as one SHA-256: first of a domain and the channel's binding, then for each message of
 * the digest so far, its type (one byte) and the SHA-256 of its payload. Quotes, the import key's certificate and the
 * state key are over it, so that nothing of one session is good in another.
 */
export class Transcript {
  #digest: Buffer;

  /** @param binding of the channel: SHA-256 over both ends' TLS keys, 32 bytes */
  constructor(binding: Uint8Array) {
    expectLength('channel binding', binding, 32);
    this.#digest = hash('sha256', Buffer.concat([DOMAIN, binding]), 'buffer');
  }

  add({ type, payload }: PeerMessage): void {
    const kind = Buffer.from([NUMBER[type]]);
    this.#digest = hash(
      'sha256',
      Buffer.concat([this.#digest, kind, hash('sha256', payload, 'buffer')]),
      'buffer',
    );
  }

  /** 32 bytes; what was added later does not change them. */
  get digest(): Buffer {
    return Buffer.from(this.#digest);
  }
}
