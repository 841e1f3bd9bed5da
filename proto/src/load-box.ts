import { createPrivateKey, diffieHellman, type KeyObject, randomBytes, randomFillSync } from 'node:crypto';
import nacl from 'tweetnacl';
import { expectLength } from './bytes.js';
import { decode, encode } from './codec.js';
import { ProtoError } from './error.js';
import type { Messages } from './generated/messages.js';
import { rawBytesOf, rawPublicKey } from './raw-key.js';

/** A NaCl box (Curve25519, XSalsa20, Poly1305) key pair, 32 bytes each. */
export interface BoxKeyPair {
  readonly publicKey: Uint8Array;
  readonly secretKey: Uint8Array;
  /** The same secret as OpenSSL holds it: reading it in takes ten times as long as using it. */
  readonly privateKey?: KeyObject;
}

export interface Boxed {
  readonly nonce: Uint8Array;
  readonly box: Uint8Array;
}

/** A new key pair, or the one of a 32-byte secret key. */
export function boxKeyPair(secretKey?: Uint8Array): BoxKeyPair {
  // In memory of its own, which its owner wipes.
  const own = secretKey ? new Uint8Array(secretKey) : randomFillSync(new Uint8Array(32));
  const privateKey = privateKeyOf(own);
  return { publicKey: new Uint8Array(rawBytesOf(privateKey)), secretKey: own, privateKey };
}

/** `direction` inside the box keeps an answer from ever being taken for a request: a box proves both ends, not which sent it. */
const DIRECTION = { LoadClaim: 'load-claim', LoadGrant: 'load-grant' } as const;
type BoxedMessages = Pick<Messages, 'LoadClaim' | 'LoadGrant'>;

/** Both keys, agreed on once (nacl.box.before): that takes longer than to seal or open with it. */
export class AgreedBox {
  readonly #key: Uint8Array;

  /** @throws ProtoError `malformed`; `forged` for a peer key of small order */
  constructor(peerKey: Uint8Array, own: BoxKeyPair) {
    expectLength('public key', peerKey, 32);
    this.#key = boxKey(peerKey, own);
  }

  seal<K extends keyof BoxedMessages>(name: K, value: Omit<BoxedMessages[K], 'direction'>): Boxed {
    const message: unknown = { ...value, direction: DIRECTION[name] };
    const plain = encode(name, message as Messages[K]);
    const nonce = randomBytes(24);
    const box = nacl.secretbox(plain, nonce, this.#key);
    plain.fill(0);
    return { nonce, box };
  }

  /** @throws ProtoError `forged` where the box was made by or for another key, or for the other direction; `malformed` */
  open<K extends keyof BoxedMessages>(name: K, boxed: Boxed): BoxedMessages[K] {
    expectLength('nonce', boxed.nonce, 24);
    const plain = nacl.secretbox.open(boxed.box, boxed.nonce, this.#key);
    if (!plain) throw new ProtoError('forged', `${name}: the box does not open with the peer's key`);
    const value = decode(name, plain);
    if (value.direction !== DIRECTION[name])
      throw new ProtoError('forged', `${name}: the box is for another direction`);
    return value;
  }

  /** It is of no use any more. */
  wipe(): void {
    this.#key.fill(0);
  }
}

/** As AgreedBox, for one use. */
export function sealBox<K extends keyof BoxedMessages>(
  name: K,
  value: Omit<BoxedMessages[K], 'direction'>,
  peerKey: Uint8Array,
  own: BoxKeyPair,
): Boxed {
  return once(peerKey, own, (box) => box.seal(name, value));
}

/** As AgreedBox, for one use. @throws ProtoError `forged`, `malformed` */
export function openBox<K extends keyof BoxedMessages>(
  name: K,
  boxed: Boxed,
  peerKey: Uint8Array,
  own: BoxKeyPair,
): BoxedMessages[K] {
  return once(peerKey, own, (box) => box.open(name, boxed));
}

function once<T>(peerKey: Uint8Array, own: BoxKeyPair, use: (box: AgreedBox) => T): T {
  const box = new AgreedBox(peerKey, own);
  try {
    return use(box);
  } finally {
    box.wipe();
  }
}

// DER prefix of RFC 8410 section 7 for a raw X25519 key.
const PKCS8_PREFIX = Buffer.from('302e020100300506032b656e04220420', 'hex');
const SIGMA = Buffer.from('expand 32-byte k');

/** The part of tweetnacl that its types leave out. */
interface Salsa {
  crypto_core_hsalsa20(out: Uint8Array, input: Uint8Array, key: Uint8Array, constant: Uint8Array): void;
}
const { lowlevel } = nacl as unknown as { lowlevel: Salsa };

/**
 * What nacl.box.before gives: HSalsa20 of the X25519 secret. The curve is OpenSSL's: tweetnacl's takes 70 ms on its first
 * use in a process, which each start of a worker would wait for, and the same bytes come out.
 * @throws ProtoError `forged` for a peer key of small order
 */
function boxKey(peerKey: Uint8Array, own: BoxKeyPair): Uint8Array {
  const shared = secretOf(own.privateKey ?? privateKeyOf(own.secretKey), peerKey);
  const key = new Uint8Array(32);
  lowlevel.crypto_core_hsalsa20(key, new Uint8Array(16), shared, SIGMA);
  shared.fill(0);
  return key;
}

/** RFC 7748 on keys of 32 bytes; the caller wipes the 32 bytes. @throws ProtoError `forged` for a peer key of small order */
export function x25519(secretKey: Uint8Array, peerKey: Uint8Array): Buffer {
  return secretOf(privateKeyOf(secretKey), peerKey);
}

function secretOf(privateKey: KeyObject, peerKey: Uint8Array): Buffer {
  const publicKey = rawPublicKey('X25519', peerKey);
  try {
    return diffieHellman({ privateKey, publicKey });
  } catch (cause) {
    throw new ProtoError('forged', "the peer's key is none", cause);
  }
}

function privateKeyOf(secretKey: Uint8Array): KeyObject {
  expectLength('secret key', secretKey, 32);
  const der = Buffer.alloc(PKCS8_PREFIX.length + 32);
  der.set(PKCS8_PREFIX);
  der.set(secretKey, PKCS8_PREFIX.length);
  try {
    return createPrivateKey({ key: der, format: 'der', type: 'pkcs8' });
  } finally {
    der.fill(0);
  }
}
