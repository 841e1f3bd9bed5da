import type { Approval } from 'tpm2-ts-bindings';
import type { Paths } from 'vtpm-common';
import { type Enrolment, readNext, type UnverifiedEnrolment } from './enrolment.js';
import {
  deriveRootKeys,
  KeyHierarchy,
  openInstallationSecrets,
  type RootKeys,
  wipe,
  wipeSecrets,
} from './keys/index.js';
import type { RootTpm } from './root-tpm/index.js';

export interface Unlocked {
  readonly keys: KeyHierarchy;
  /** Of the newest generation of the root key. */
  readonly enrolment: Enrolment;
  /** A rotation to that generation is under way. */
  readonly isRotating: boolean;
}

/**
 * Has the TPM release the root key, in both generations while a rotation is under way, and verifies the enrolment with
 * it.
 * @throws ManagerError `platform-policy`, the TPM's, or `store-corrupt` where an enrolment was changed
 */
export async function unlock(
  tpm: RootTpm,
  paths: Paths['manager'],
  file: UnverifiedEnrolment,
  approvals: readonly Approval[],
): Promise<Unlocked> {
  const next = readNext(paths);
  const root = await release(tpm, file, approvals);
  const keys = hierarchy(root, file.enrolment);
  if (!next) return { keys, enrolment: file.enrolment, isRotating: false };
  try {
    keys.advance(await release(tpm, next, approvals));
    return { keys, enrolment: next.enrolment, isRotating: true };
  } catch (error) {
    keys.wipe();
    throw error;
  }
}

async function release(
  tpm: RootTpm,
  file: UnverifiedEnrolment,
  approvals: readonly Approval[],
): Promise<RootKeys> {
  return verifiedKeys(await tpm.releaseRootKey(file.enrolment.tpm, approvals), file);
}

/**
 * The keys of the generation that an enrolment names, which must be as they wrote it.
 * @param rootKey 32 bytes, wiped
 * @throws ManagerError `store-corrupt`
 */
export function verifiedKeys(rootKey: Buffer, { enrolment, verify }: UnverifiedEnrolment): RootKeys {
  const keys = rootKeysOf(rootKey, enrolment);
  wipe(rootKey);
  try {
    verify(keys.enrolmentMacKey);
    return keys;
  } catch (error) {
    keys.wipe();
    throw error;
  }
}

/** @param rootKey 32 bytes; the caller wipes it */
export function rootKeysOf(
  rootKey: Uint8Array,
  { storeId, tpm }: Pick<Enrolment, 'storeId' | 'tpm'>,
): RootKeys {
  return deriveRootKeys(rootKey, Buffer.from(storeId, 'hex'), tpm.root.generation);
}

/** Takes over `root`. @throws ManagerError `store-corrupt` */
export function hierarchy(root: RootKeys, { keyring }: Enrolment): KeyHierarchy {
  const secrets = openInstallationSecrets(root, Buffer.from(keyring, 'base64'));
  try {
    return new KeyHierarchy(root, secrets);
  } finally {
    wipeSecrets(secrets);
  }
}
