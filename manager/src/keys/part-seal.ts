import {
  bytesEqual,
  decode,
  encode,
  type PartContext,
  type PartKind,
  publicRandom,
  type SealedPart,
} from 'vtpm-proto';
import { ManagerError } from '../error.js';
import { aeadOpen, aeadSeal } from './aead.js';
import { hkdf, wipe } from './secret.js';

const SALT_BYTES = 32;

/**
 * Encrypts one part of a save. The key is used once: it comes from 32 fresh random bytes, so that the number of saves
 * of a vTPM is not bounded by GCM's nonce.
 */
export function sealPart(
  dataKey: Uint8Array,
  context: Omit<PartContext, 'length'>,
  plain: Uint8Array,
): SealedPart {
  const bytes = encode('PartContext', { ...context, length: BigInt(plain.length) });
  const salt = publicRandom(SALT_BYTES);
  const key = partKey(dataKey, salt, context.kind);
  try {
    return { context: bytes, salt, ...aeadSeal(key, bytes, plain) };
  } finally {
    wipe(key);
  }
}

/** What a part must say of itself to be taken. Generation and epoch are upper bounds: old parts stay valid. */
export type ExpectedContext = Pick<
  PartContext,
  'format' | 'kind' | 'keyId' | 'storeId' | 'vtpmUuid' | 'vmUuid' | 'vmRunId' | 'generation' | 'epoch'
>;

/** @returns the plaintext; the caller wipes it @throws ManagerError `store-corrupt` */
export function openPart(dataKey: Uint8Array, part: SealedPart, expected: ExpectedContext): Buffer {
  const what = `the ${expected.kind.toLowerCase()} part`;
  const context = decode('PartContext', part.context);
  const mismatch =
    (['format', 'kind', 'keyId'] as const).find((field) => context[field] !== expected[field]) ??
    (['storeId', 'vtpmUuid', 'vmUuid', 'vmRunId'] as const).find(
      (field) => !bytesEqual(context[field], expected[field]),
    ) ??
    (['generation', 'epoch'] as const).find((field) => context[field] > expected[field]);
  if (mismatch) throw new ManagerError('store-corrupt', `${what} has another ${mismatch} than its record`);
  if (part.salt.length !== SALT_BYTES) {
    throw new ManagerError('store-corrupt', `${what} has a salt of ${part.salt.length} bytes`);
  }
  const key = partKey(dataKey, part.salt, context.kind);
  try {
    const plain = aeadOpen(key, part.context, part, what);
    if (BigInt(plain.length) !== context.length) {
      wipe(plain);
      throw new ManagerError('store-corrupt', `${what} has another length than it says`);
    }
    return plain;
  } finally {
    wipe(key);
  }
}

function partKey(dataKey: Uint8Array, salt: Uint8Array, kind: PartKind): Buffer {
  return hkdf(dataKey, salt, `vtpm.v1 part ${kind}`);
}
