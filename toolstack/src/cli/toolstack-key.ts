import { randomBytes } from 'node:crypto';
import { closeSync, fstatSync, openSync, readFileSync } from 'node:fs';
import { forbidCoreDumps, type Paths, privateDirectory, writeFileDurably } from 'vtpm-common';
import { type SigningKey, signDelegation, signingKeyFromSeed, uuidToBytes } from 'vtpm-proto';
import { ToolstackError } from '../error.js';

const SEED_BYTES = 32;

/** Makes the toolstack key where there is none: the 32-byte seed of an Ed25519 key, readable by its owner only. */
export function makeToolstackKey(paths: Paths): SigningKey {
  forbidCoreDumps();
  privateDirectory(paths.toolstack.directory);
  try {
    return readToolstackKey(paths);
  } catch (error) {
    if (!(error instanceof ToolstackError) || error.code !== 'not-initialised') throw error;
  }
  const seed = randomBytes(SEED_BYTES);
  writeFileDurably(paths.toolstack.key, seed, 0o600);
  const key = signingKeyFromSeed(seed);
  seed.fill(0);
  return key;
}

/** @throws ToolstackError `not-initialised` where there is none, `corrupt` where it is no key or others may read it */
export function readToolstackKey(paths: Paths): SigningKey {
  forbidCoreDumps();
  const path = paths.toolstack.key;
  let fd: number;
  try {
    fd = openSync(path, 'r');
  } catch (cause) {
    const { code, message } = cause as NodeJS.ErrnoException;
    if (code === 'ENOENT') {
      throw new ToolstackError(
        'not-initialised',
        `there is no toolstack key at ${path}; make the installation with vtpmctl init, or name another with --home`,
        { cause },
      );
    }
    throw new ToolstackError('internal', `the toolstack key ${path} cannot be opened: ${message}`, { cause });
  }
  try {
    if ((fstatSync(fd).mode & 0o077) !== 0) {
      throw new ToolstackError(
        'corrupt',
        `others may read the toolstack key ${path}; run: chmod 600 ${path}`,
      );
    }
    const seed = readFileSync(fd);
    if (seed.length !== SEED_BYTES) {
      throw new ToolstackError(
        'corrupt',
        `the toolstack key ${path} has ${seed.length} bytes, not ${SEED_BYTES}; restore it from a backup`,
      );
    }
    const key = signingKeyFromSeed(seed);
    seed.fill(0);
    return key;
  } finally {
    closeSync(fd);
  }
}

export interface DelegationText {
  /** base64 */
  readonly delegation: string;
  /** base64 */
  readonly delegationSignature: string;
}

/**
 * Lets the supervisor sign tickets to make, power on and resume one vTPM; to import and export its state in the clear only
 * where that is wanted. @param kind `exists`: it is never made here
 */
export function delegate(
  key: SigningKey,
  vtpm: { readonly id: string; readonly vmUuid: string; readonly delegateKey: string },
  { isPlain, exists }: { readonly isPlain: boolean; readonly exists: boolean },
): DelegationText {
  const delegateKey = Buffer.from(vtpm.delegateKey, 'hex');
  if (delegateKey.length !== 32) {
    throw new ToolstackError(
      'internal',
      'the supervisor named no delegate key of 32 bytes; see vtpmctl logs',
    );
  }
  const { delegation, signature } = signDelegation(key, {
    format: 1,
    toolstackKey: key.publicKey,
    delegateKey,
    vtpmUuid: uuidToBytes(vtpm.id),
    vmUuid: uuidToBytes(vtpm.vmUuid),
    verbs: [
      ...(exists ? [] : (['MANUFACTURE'] as const)),
      ...(['COLD', 'RESUME'] as const),
      ...(isPlain ? (['IMPORT', 'EXPORT'] as const) : []),
    ],
  });
  return {
    delegation: delegation.toString('base64'),
    delegationSignature: signature.toString('base64'),
  };
}
