import { type KeyObject, timingSafeEqual } from 'node:crypto';
import { concat, wipe } from './bytes.js';
import { decode, encode, sized, tpm2b, type ValueOf } from './codec.js';
import { Alg } from './constants.js';
import { cfb, decapsulate, digest, encapsulate, nameOf, random, requireHash } from './crypto.js';
import { TpmError } from './error.js';
import { protect, unprotect } from './protect.js';
import {
  type Public,
  type PublicArea,
  type Sensitive,
  tpmtSensitive,
  type tpmtSymDef,
} from './structures.js';
import { Reader } from './wire.js';

/** An object on its way to another TPM: the parameters of Import, and what Duplicate gives. */
export interface Wrapped {
  /** Of the inner wrapper; empty without one. Hand it over on another way than the rest. */
  readonly encryptionKey: Buffer;
  readonly objectPublic: PublicArea;
  readonly duplicate: Buffer;
  /** Empty without an outer wrapper. */
  readonly inSymSeed: Buffer;
  /** Algorithm of the inner wrapper. */
  readonly symmetricAlg: ValueOf<typeof tpmtSymDef>;
}

const NO_IV = Buffer.alloc(16);
const NOTHING = Buffer.alloc(0);
const tpm2bSensitive = sized(tpmtSensitive);

/**
 * Wraps an object made in software for Import under `parent` (Part 1, "Duplication").
 * @param objectPublic without fixedTPM and fixedParent; its `unique` has to fit `sensitive`
 * @param options `inner`: a second wrapper of AES with a key of that many bits. An object with encryptedDuplication
 * needs one.
 */
export function wrapForImport(
  parent: Public,
  objectPublic: PublicArea,
  sensitive: Sensitive,
  options: { readonly inner?: 128 | 256 } = {},
): Wrapped {
  const name = nameOf(objectPublic.value.nameAlg, objectPublic.bytes);
  const encryptionKey = options.inner === undefined ? NOTHING : random(options.inner / 8);
  const { secret, encrypted } = encapsulate(parent, 'DUPLICATE');
  const plain = encode(tpm2bSensitive, sensitive);
  const inner =
    options.inner === undefined ? plain : wrapInner(objectPublic.value, encryptionKey, name, plain);
  try {
    return {
      encryptionKey,
      objectPublic,
      duplicate: protect(parent, secret, name, inner),
      inSymSeed: encrypted,
      symmetricAlg:
        options.inner === undefined
          ? { algorithm: Alg.NULL }
          : { algorithm: Alg.AES, keyBits: options.inner, mode: Alg.CFB },
    };
  } finally {
    wipe(secret, plain, inner);
  }
}

/**
 * The private part of an object that a TPM duplicated to a key held in software.
 * @param parent with its private key; undefined where it was duplicated to Rh.NULL
 * @throws TpmError `malformed` where anything was changed or the parent is another one
 */
export function unwrapDuplicate(
  parent: { readonly key: Public; readonly privateKey: KeyObject } | undefined,
  wrapped: Wrapped,
): Sensitive {
  const { objectPublic } = wrapped;
  const name = nameOf(objectPublic.value.nameAlg, objectPublic.bytes);
  const outer = parent === undefined ? concat(wrapped.duplicate) : unwrapOuter(parent, name, wrapped);
  const plain =
    wrapped.symmetricAlg.algorithm === Alg.NULL
      ? concat(outer)
      : unwrapInner(objectPublic.value, wrapped.encryptionKey, name, outer);
  try {
    return decode(tpm2bSensitive, plain, 'duplicate');
  } finally {
    wipe(outer, plain);
  }
}

function unwrapOuter(
  { key, privateKey }: { readonly key: Public; readonly privateKey: KeyObject },
  name: Buffer,
  wrapped: Wrapped,
): Buffer {
  const seed = decapsulate(key, privateKey, 'DUPLICATE', wrapped.inSymSeed);
  try {
    return unprotect(key, seed, name, wrapped.duplicate);
  } finally {
    wipe(seed);
  }
}

/**
 * A digest over the plain bytes and the Name goes in front, then all is encrypted (Part 1, "Inner Duplication
 * Wrapper").
 */
function wrapInner(object: Public, key: Buffer, name: Buffer, plain: Buffer): Buffer {
  const integrity = digest(requireHash(object.nameAlg), plain, name);
  const together = concat(encode(tpm2b, integrity), plain);
  try {
    return cfb('encrypt', key, NO_IV, together);
  } finally {
    wipe(together);
  }
}

function unwrapInner(object: Public, key: Buffer, name: Buffer, encrypted: Buffer): Buffer {
  const together = cfb('decrypt', key, NO_IV, encrypted);
  try {
    const reader = new Reader(together, 'duplicate');
    const received = tpm2b.read(reader);
    const plain = reader.bytes(reader.left);
    const expected = digest(requireHash(object.nameAlg), plain, name);
    if (received.length !== expected.length || !timingSafeEqual(received, expected)) {
      wipe(plain);
      throw new TpmError('malformed', 'duplicate: the inner wrapper was changed or its key is another one');
    }
    return plain;
  } finally {
    wipe(together);
  }
}
