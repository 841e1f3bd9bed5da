import { existsSync } from 'node:fs';
import type { Logger, Paths } from 'vtpm-common';
import { readApprovals } from './approvals-file.js';
import {
  adoptNext,
  type Enrolment,
  readEnrolment,
  readNext,
  rewriteEnrolment,
  type UnverifiedEnrolment,
  writeNext,
} from './enrolment.js';
import { ManagerError } from './error.js';
import {
  type KeyHierarchy,
  openInstallationSecrets,
  type RootKeys,
  sealInstallationSecrets,
  wipe,
  wipeSecrets,
} from './keys/index.js';
import { acquireLock } from './lock.js';
import { openPlatform, type Platform, parseTpm } from './platform.js';
import { boxForRecovery, newRecoveryKey, openRecoveryBox } from './recovery-key.js';
import { type RootTpmLocation, rootKeyFromInputs } from './root-tpm/index.js';
import { openLmdbStore, spoilAnchor } from './store/index.js';
import { type AcceptOptions, acceptStore, type RecoveredVtpm, surveyStore } from './store-acceptance.js';
import { hierarchy, rootKeysOf, unlock } from './unlock.js';

/**
 * What an operator does when a start is refused and the newest store, or the TPM, is gone for good. It runs offline, with
 * the manager stopped, says first what goes back to what, and leaves a mark on every vTPM for ever.
 */
export interface RecoverOptions {
  readonly paths: Paths;
  readonly log: Logger;
  readonly storeSandbox: boolean;
  readonly tpmDeadlineMs: number;
  readonly ownerAuth: Uint8Array | undefined;
  /** Takes what is on the disk for the newest. Without it nothing is changed. */
  readonly acceptRollback: boolean;
  /** 32 bytes, wiped: releases the root key instead of the TPM, which is then enrolled anew. */
  readonly recoveryKey: Buffer | undefined;
  /** With a recovery key: the TPM to enrol; the old one unless given. */
  readonly tpm: string | undefined;
  readonly pcrSelection: string | undefined;
}

/** What is, or was, done. */
export interface RecoverResult {
  readonly isDone: boolean;
  /** Why a start refuses the store as it is; undefined where it does not. */
  readonly refusal: string | undefined;
  readonly vtpms: readonly RecoveredVtpm[];
  /** A new one, shown once: only with a recovery key. */
  readonly recoveryKey: string | undefined;
}

export async function recover(options: RecoverOptions): Promise<RecoverResult> {
  const paths = options.paths.manager;
  const release = acquireLock(paths);
  try {
    return await (options.recoveryKey ? withoutTpm(options, options.recoveryKey) : withTpm(options));
  } finally {
    wipe(options.recoveryKey, options.ownerAuth);
    release();
  }
}

/** The TPM releases the root key as ever; what is on the disk is old, or the counter in the TPM is gone. */
async function withTpm(options: RecoverOptions): Promise<RecoverResult> {
  const paths = options.paths.manager;
  const file = readEnrolment(paths);
  const platform = await open(options, file.enrolment.tpm);
  try {
    const { keys, enrolment, isRotating } = await unlock(platform.tpm, paths, file, readApprovals(paths));
    try {
      if (isRotating) {
        throw new ManagerError(
          'busy',
          'a rotation of the root key is under way; put the newest store back, or use the recovery key',
        );
      }
      return await acceptOld(options, platform, keys, enrolment);
    } finally {
      keys.wipe();
    }
  } finally {
    await platform.close();
  }
}

async function acceptOld(
  options: RecoverOptions,
  { tpm }: Platform,
  keys: KeyHierarchy,
  enrolment: Enrolment,
): Promise<RecoverResult> {
  const paths = options.paths.manager;
  let inForce = enrolment;
  const counterOf = () => tpm.anchorCounter(inForce.tpm, keys.anchorAuth);
  let counted: bigint | undefined;
  try {
    counted = await counterOf().read();
  } catch (error) {
    if (!(error instanceof ManagerError) || error.code !== 'anchor-removed') throw error;
  }
  return await inStore(options, keys, 'rolled-back', async (accept) => {
    const { refusal, vtpms } = await surveyStore(accept, counted);
    if (refusal === undefined || !options.acceptRollback) {
      return { isDone: false, refusal, vtpms, recoveryKey: undefined };
    }
    // Whatever the counter says from here on, no start takes the store before it is accepted as a whole.
    await spoilAnchor(accept.store, keys);
    if (counted === undefined) {
      const { ownerAuth } = options;
      const renewed = await tpm.recreateAnchorCounter(inForce.tpm, keys.anchorAuth, {
        ...(ownerAuth && { ownerAuth }),
      });
      inForce = { ...inForce, tpm: renewed };
      rewriteEnrolment(paths, inForce, keys.current.enrolmentMacKey);
    }
    await acceptStore(accept, counterOf());
    return { isDone: true, refusal, vtpms, recoveryKey: undefined };
  });
}

/** The TPM that was enrolled is lost, or its platform policy for good: a TPM is enrolled anew. */
async function withoutTpm(options: RecoverOptions, recoveryKey: Buffer): Promise<RecoverResult> {
  const paths = options.paths.manager;
  const file = readEnrolment(paths);
  const old = file.enrolment;
  const next = readNext(paths);
  const keys = hierarchy(unbox(recoveryKey, file), old);
  try {
    const location = options.tpm === undefined ? old.tpm : parseTpm(options.tpm, paths);
    const platform = await open(options, location);
    try {
      if (next) keys.advance(await releaseNext(recoveryKey, next, platform));
      return await inStore(options, keys, 'recovered', async (accept) => {
        const { vtpms } = await surveyStore(accept, undefined);
        const refusal = 'the recovery key is used: whether the store is the newest cannot be known';
        if (!options.acceptRollback) return { isDone: false, refusal, vtpms, recoveryKey: undefined };
        const before = next ? [old, next.enrolment] : [old];
        const { enrolment, text } = await enrolAnew(options, platform, keys, before);
        await spoilAnchor(accept.store, keys);
        await acceptStore(accept, platform.tpm.anchorCounter(enrolment.tpm, keys.anchorAuth));
        adoptNext(paths);
        return { isDone: true, refusal, vtpms, recoveryKey: text };
      });
    } finally {
      await platform.close();
    }
  } finally {
    keys.wipe();
  }
}

/** @throws ManagerError `bad-request` where it is another recovery key */
function unbox(recoveryKey: Uint8Array, { enrolment, verify }: UnverifiedEnrolment): RootKeys {
  const { installation, root } = enrolment.tpm;
  const inputs = openRecoveryBox(recoveryKey, enrolment.recovery, installation, root.generation);
  const rootKey = rootKeyFromInputs(inputs, Buffer.from(installation, 'hex'));
  const keys = rootKeysOf(rootKey, enrolment);
  wipe(inputs, rootKey);
  verify(keys.enrolmentMacKey);
  return keys;
}

/** A rotation was under way, which has the same recovery key; or an earlier recovery, whose generation is the TPM's. */
async function releaseNext(
  recoveryKey: Uint8Array,
  next: UnverifiedEnrolment,
  { tpm }: Platform,
): Promise<RootKeys> {
  try {
    return unbox(recoveryKey, next);
  } catch (error) {
    if (!(error instanceof ManagerError) || error.code !== 'bad-request') throw error;
  }
  const rootKey = await tpm.releaseRootKey(next.enrolment.tpm);
  const keys = rootKeysOf(rootKey, next.enrolment);
  wipe(rootKey);
  next.verify(keys.enrolmentMacKey);
  return keys;
}

/** The enrolment of a new generation, written beside the old one. @param before what may be in the TPM of earlier ones */
async function enrolAnew(
  options: RecoverOptions,
  { tpm }: Platform,
  keys: KeyHierarchy,
  before: readonly Enrolment[],
): Promise<{ enrolment: Enrolment; text: string }> {
  const [old] = before;
  if (!old) throw new ManagerError('internal', 'there is no enrolment to recover');
  const paths = options.paths.manager;
  const { ownerAuth, pcrSelection = old.tpm.root.pcrSelection } = options;
  const made = await tpm.enrol({
    installation: Buffer.from(old.tpm.installation, 'hex'),
    pcrSelection,
    srkHandle: old.tpm.srkHandle,
    anchorAuth: keys.anchorAuth,
    ...(ownerAuth && { ownerAuth }),
  });
  try {
    const generation = keys.current.keyId + 1;
    const facts = {
      storeId: old.storeId,
      tpm: { ...made.enrolment, root: { ...made.enrolment.root, generation } },
    };
    const root = rootKeysOf(made.rootKey, facts);
    const first = keys.generations.at(-1) ?? keys.current;
    const secrets = openInstallationSecrets(first, Buffer.from(old.keyring, 'base64'));
    const recovery = newRecoveryKey();
    const enrolment: Enrolment = {
      ...old,
      ...facts,
      keyring: sealInstallationSecrets(root, secrets).toString('base64'),
      recovery: boxForRecovery(recovery.publicKey, old.tpm.installation, generation, made.recoveryInputs),
      erase: before.flatMap(({ erase, tpm: { root: erased } }) => [...erase, erased]),
      planned: before.flatMap(({ planned, tpm: { anchor, revocation } }) => [...planned, anchor, revocation]),
    };
    wipeSecrets(secrets);
    writeNext(paths, enrolment, root.enrolmentMacKey);
    keys.advance(root);
    return { enrolment, text: recovery.text };
  } finally {
    wipe(made.rootKey, made.recoveryInputs);
  }
}

function open(options: RecoverOptions, location: RootTpmLocation): Promise<Platform> {
  const { kind, path } = location;
  const paths = options.paths.manager;
  // Only where it is knowingly lost, and with the recovery key: a start never makes a TPM.
  const create = kind === 'embedded' && options.recoveryKey !== undefined && !existsSync(paths.softtpm);
  return openPlatform({ kind, path }, paths, options.log, create, options.tpmDeadlineMs);
}

async function inStore(
  { paths, storeSandbox, log }: RecoverOptions,
  keys: KeyHierarchy,
  mark: AcceptOptions['mark'],
  body: (accept: AcceptOptions) => Promise<RecoverResult>,
): Promise<RecoverResult> {
  const store = await openLmdbStore({
    directory: paths.manager.store,
    create: false,
    sandbox: storeSandbox,
    log,
    onLost: () => undefined,
  });
  try {
    return await body({ store, keys, paths: paths.manager, log, mark });
  } finally {
    await store.close();
  }
}
