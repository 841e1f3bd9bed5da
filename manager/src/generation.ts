import type { Enrolment } from './enrolment.js';
import {
  type InstallationSecrets,
  openInstallationSecrets,
  type RootKeys,
  sealInstallationSecrets,
  wipeSecrets,
} from './keys/index.js';
import { boxForRecovery } from './recovery-key.js';
import type { NewGeneration } from './root-tpm/index.js';
import { rootKeysOf } from './unlock.js';

/** A generation of the root key as the TPM has just made it. */
export type MadeGeneration = Pick<NewGeneration, 'enrolment' | 'rootKey' | 'recoveryInputs'>;

export interface SealedGeneration {
  /** To be written into the enrolment. */
  readonly facts: Pick<Enrolment, 'storeId' | 'tpm' | 'keyring' | 'recovery'>;
  /** The caller owns them. */
  readonly root: RootKeys;
}

/**
 * Puts the installation's secrets under a new generation, and what that is made of into the box of the recovery key.
 * @param made its buffers stay the caller's to wipe
 * @param recoveryKey public half, hex
 */
export function sealGeneration(
  made: MadeGeneration,
  storeId: string,
  secrets: InstallationSecrets,
  recoveryKey: string,
): SealedGeneration {
  const { enrolment: tpm, rootKey, recoveryInputs } = made;
  const root = rootKeysOf(rootKey, { storeId, tpm });
  return {
    root,
    facts: {
      storeId,
      tpm,
      keyring: sealInstallationSecrets(root, secrets).toString('base64'),
      recovery: boxForRecovery(recoveryKey, tpm.installation, tpm.root.generation, recoveryInputs),
    },
  };
}

/**
 * The same with the secrets that an enrolment has under another generation.
 * @param under the keys of the generation that `enrolment` is of
 * @throws ManagerError `store-corrupt`
 */
export function resealGeneration(
  made: MadeGeneration,
  enrolment: Pick<Enrolment, 'storeId' | 'keyring'>,
  under: RootKeys,
  recoveryKey: string,
): SealedGeneration {
  const secrets = openInstallationSecrets(under, Buffer.from(enrolment.keyring, 'base64'));
  try {
    return sealGeneration(made, enrolment.storeId, secrets, recoveryKey);
  } finally {
    wipeSecrets(secrets);
  }
}
