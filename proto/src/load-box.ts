import { randomBytes } from 'node:crypto';
import nacl from 'tweetnacl';
import { expectLength } from './bytes.js';
import { decode, encode } from './codec.js';
import { ProtoError } from './error.js';
import type { Messages } from './generated/messages.js';

/** A NaCl box (Curve25519, XSalsa20, Poly1305) key pair, 32 bytes each. */
export interface BoxKeyPair {
  readonly publicKey: Uint8Array;
  readonly secretKey: Uint8Array;
}

export interface Boxed {
  readonly nonce: Uint8Array;
  readonly box: Uint8Array;
}

/** A new key pair, or the one of a 32-byte secret key. */
export function boxKeyPair(secretKey?: Uint8Array): BoxKeyPair {
  return secretKey ? nacl.box.keyPair.fromSecretKey(secretKey) : nacl.box.keyPair();
}

/** `direction` inside the box keeps an answer from ever being taken for a request: a box proves both ends, not which sent it. */
const DIRECTION = { LoadClaim: 'load-claim', LoadGrant: 'load-grant' } as const;
type BoxedMessages = Pick<Messages, 'LoadClaim' | 'LoadGrant'>;

export function sealBox<K extends keyof BoxedMessages>(
  name: K,
  value: Omit<BoxedMessages[K], 'direction'>,
  peerKey: Uint8Array,
  own: BoxKeyPair,
): Boxed {
  const message: unknown = { ...value, direction: DIRECTION[name] };
  const plain = encode(name, message as Messages[K]);
  const nonce = randomBytes(24);
  const box = nacl.box(plain, nonce, peerKey, own.secretKey);
  plain.fill(0);
  return { nonce, box };
}

/** @throws ProtoError `forged` where the box was made by or for another key, or for the other direction; `malformed` */
export function openBox<K extends keyof BoxedMessages>(
  name: K,
  boxed: Boxed,
  peerKey: Uint8Array,
  own: BoxKeyPair,
): BoxedMessages[K] {
  expectLength('nonce', boxed.nonce, 24);
  expectLength('public key', peerKey, 32);
  const plain = nacl.box.open(boxed.box, boxed.nonce, peerKey, own.secretKey);
  if (!plain) throw new ProtoError('forged', `${name}: the box does not open with the peer's key`);
  const value = decode(name, plain);
  if (value.direction !== DIRECTION[name])
    throw new ProtoError('forged', `${name}: the box is for another direction`);
  return value;
}
