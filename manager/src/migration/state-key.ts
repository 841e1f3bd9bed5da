import { createHmac, timingSafeEqual } from 'node:crypto';
import { type BoxKeyPair, expectLength, ProtoError, x25519 } from 'vtpm-proto';
import { ManagerError } from '../error.js';
import { hkdf, wipe } from '../keys/index.js';

/** What a part of the travelling state is. In this order on the wire. */
export const PART_ORDER = ['PERMANENT', 'VOLATILE', 'REFERENCE_KEY'] as const;
export type TravellingPart = (typeof PART_ORDER)[number];

/**
 * The keys of one migration. They come from the secret that only the destination's TPM unwraps and from an X25519 secret of
 * this session only: recorded traffic opens with neither long-term keys nor the chip alone. Both ends wipe them.
 *
 *     root = HKDF-SHA256(unwrapped secret (32) ‖ X25519 secret (32), salt = transcript, "vtpm.v1 migration state")
 */
export class StateKeys {
  readonly #root: Buffer;

  /** @throws ProtoError `malformed` where one of the three does not have 32 bytes: half a key would be a key */
  constructor(unwrapped: Uint8Array, shared: Uint8Array, transcript: Uint8Array) {
    expectLength('unwrapped secret', unwrapped, 32);
    expectLength('X25519 secret', shared, 32);
    expectLength('transcript', transcript, 32);
    const input = Buffer.concat([unwrapped, shared]);
    this.#root = hkdf(input, transcript, 'vtpm.v1 migration state');
    wipe(input);
  }

  /** Of one part, used once. 32 bytes; the caller wipes it. */
  part(kind: TravellingPart): Buffer {
    return this.#derive(`part ${kind}`);
  }

  /** Over everything that travels. 32 bytes. */
  completeness(pieces: Iterable<Uint8Array>): Buffer {
    return this.#mac('completeness', pieces);
  }

  /** That whoever made it has the keys: of the transcript up to it. 32 bytes. */
  confirmation(transcript: Uint8Array): Buffer {
    return this.#mac('confirmation', [transcript]);
  }

  confirms(proof: Uint8Array, transcript: Uint8Array): boolean {
    return macsEqual(proof, this.confirmation(transcript));
  }

  wipe(): void {
    wipe(this.#root);
  }

  #mac(purpose: string, pieces: Iterable<Uint8Array>): Buffer {
    const key = this.#derive(purpose);
    const mac = createHmac('sha256', key);
    wipe(key);
    for (const piece of pieces) mac.update(piece);
    return mac.digest();
  }

  #derive(purpose: string): Buffer {
    return hkdf(this.#root, Buffer.alloc(0), `vtpm.v1 migration ${purpose}`);
  }
}

/** Of the two keys of this session only, 32 bytes; the caller wipes it. @throws ManagerError `bad-request` */
export function sharedSecret(session: BoxKeyPair, peerKey: Uint8Array): Buffer {
  try {
    return x25519(session.secretKey, peerKey);
  } catch (error) {
    if (!(error instanceof ProtoError)) throw error;
    throw new ManagerError('bad-request', `the session key of the other host is none: ${error.message}`);
  }
}

export function macsEqual(a: Uint8Array, b: Uint8Array): boolean {
  return a.length === b.length && timingSafeEqual(a, b);
}
