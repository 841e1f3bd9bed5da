import { randomBytes } from 'node:crypto';
import { existsSync, rmSync } from 'node:fs';
import { type Logger, type Paths, privateDirectory } from 'vtpm-common';
import { createAuditLog } from './audit/index.js';
import {
  checkNotEnrolled,
  ENROLMENT_FORMAT,
  type Enrolment,
  finishEnrolment,
  unfinishedPath,
  writeUnfinished,
} from './enrolment.js';
import { ManagerError } from './error.js';
import { sealGeneration } from './generation.js';
import { anchorAuthOf, KeyHierarchy, newInstallationSecrets, wipe, wipeSecrets } from './keys/index.js';
import { acquireLock } from './lock.js';
import { NOT_HARDWARE_PROTECTED, openPlatform, parseTpm } from './platform.js';
import { newRecoveryKey } from './recovery-key.js';
import type { AnchorCounter, RootTpm, RootTpmEnrolment } from './root-tpm/index.js';
import { createAnchoredStore, withLmdbStore } from './store/index.js';
import { createTrustStore } from './trust/trust-configuration.js';

export interface InitOptions {
  readonly paths: Paths;
  readonly log: Logger;
  /** `auto`, `device:PATH`, `unix:PATH` or `embedded` */
  readonly tpm: string;
  /** Lets `auto` take the embedded TPM where there is no chip. */
  readonly mayEmbed: boolean;
  readonly pcrSelection: string;
  readonly srkHandle: number;
  /** Keeps the anchor's counter in the chip's RAM between orderly shutdowns. */
  readonly orderlyCounter: boolean;
  readonly ownerAuth: Uint8Array | undefined;
  /** Ed25519 public key, 32 bytes. */
  readonly toolstackKey: Uint8Array;
  readonly storeSandbox: boolean;
  readonly tpmDeadlineMs: number;
}

export interface InitResult {
  readonly managerId: string;
  readonly tpm: Pick<RootTpmEnrolment, 'kind' | 'path' | 'manufacturer' | 'firmwareVersion'> & {
    readonly hardwareProtected: boolean;
  };
  readonly storeId: string;
  readonly pcrSelection: string;
  /** Secret: shown once, and kept nowhere here. */
  readonly recoveryKey: string;
  readonly warnings: readonly string[];
}

const CHIP = '/dev/tpmrm0';

/**
 * Makes an installation: enrols with the TPM, makes the store, and last of all writes the enrolment. What fails on the
 * way takes with it what it made; what is killed leaves something that no start and no second init takes for whole.
 * @throws ManagerError `already-initialised`, `in-use`, `bad-request`, or the TPM's
 */
export async function initialise(options: InitOptions): Promise<InitResult> {
  const paths = options.paths.manager;
  const location = parseTpm(chooseTpm(options), paths);
  privateDirectory(paths.directory);
  const release = acquireLock(paths);
  try {
    checkNotEnrolled(paths);
    try {
      return resultOf(await enrol(options, location));
    } catch (error) {
      rmSync(paths.store, { recursive: true, force: true });
      rmSync(paths.softtpm, { recursive: true, force: true });
      rmSync(paths.audit, { force: true });
      throw error;
    }
  } finally {
    release();
  }
}

interface Initialised {
  readonly enrolment: Enrolment;
  readonly recoveryKey: string;
  readonly leftovers: readonly number[];
}

async function enrol(options: InitOptions, location: ReturnType<typeof parseTpm>): Promise<Initialised> {
  const paths = options.paths.manager;
  const platform = await openPlatform(location, paths, options.log, true, options.tpmDeadlineMs);
  const secrets = newInstallationSecrets();
  const storeId = randomBytes(16);
  const anchorAuth = anchorAuthOf(secrets, storeId);
  try {
    const { pcrSelection, srkHandle, orderlyCounter: orderly, ownerAuth } = options;
    const made = await platform.tpm.enrol({
      installation: randomBytes(16),
      pcrSelection,
      srkHandle,
      anchorAuth,
      orderly,
      ...(ownerAuth && { ownerAuth }),
    });
    const { leftovers } = made;
    const recovery = newRecoveryKey();
    const { facts, root } = sealGeneration(made, storeId.toString('hex'), secrets, recovery.publicKey);
    const keys = new KeyHierarchy(root, secrets);
    try {
      const enrolment: Enrolment = {
        format: ENROLMENT_FORMAT,
        createdAt: new Date().toISOString(),
        managerId: Buffer.from(keys.identity.publicKey).toString('hex'),
        ...facts,
        erase: [],
        planned: [],
      };
      writeUnfinished(paths, enrolment, root.enrolmentMacKey);
      await makeStore(options, keys, platform.tpm.anchorCounter(facts.tpm, anchorAuth));
      finishEnrolment(paths);
      return { enrolment, recoveryKey: recovery.text, leftovers };
    } catch (error) {
      await takeBack(options, platform.tpm, facts.tpm);
      throw error;
    } finally {
      keys.wipe();
      wipe(made.rootKey, made.recoveryInputs);
    }
  } finally {
    wipeSecrets(secrets);
    wipe(anchorAuth, options.ownerAuth);
    await platform.close();
  }
}

/** What is in the TPM was made a moment ago and nobody else knows of it. Where it cannot be reached, uninstall will. */
async function takeBack(options: InitOptions, tpm: RootTpm, enrolment: RootTpmEnrolment): Promise<void> {
  const { ownerAuth } = options;
  try {
    await tpm.withdraw(enrolment, { ...(ownerAuth && { ownerAuth }), evict: true });
  } catch (error) {
    options.log.error(
      { reason: (error as Error).message },
      'init failed and could not take back what it put into the TPM; vtpmctl uninstall does it when the TPM answers',
    );
    return;
  }
  rmSync(unfinishedPath(options.paths.manager), { force: true });
}

async function makeStore(
  { paths: { manager: paths }, storeSandbox: sandbox, log, toolstackKey }: InitOptions,
  keys: KeyHierarchy,
  counter: AnchorCounter,
): Promise<void> {
  const { keyId: id, auditKey: key } = keys.current;
  const audit = await createAuditLog(paths.audit, { id, key });
  try {
    await withLmdbStore({ directory: paths.store, create: true, sandbox, log }, async (raw) => {
      await audit.append({
        actor: { uid: process.getuid?.() ?? 0 },
        action: 'init',
        verdict: 'done',
        facts: { toolstackKey: Buffer.from(toolstackKey).toString('hex') },
      });
      const anchor = { keys, counter, windowMs: 0, log, auditHead: () => audit.head };
      const store = await createAnchoredStore(raw, anchor);
      await createTrustStore(keys, store, toolstackKey, BigInt(Date.now()));
      await store.close();
    });
  } finally {
    await audit.close();
  }
}

function chooseTpm({ tpm, mayEmbed }: InitOptions): string {
  if (tpm !== 'auto') return tpm;
  if (existsSync(CHIP)) return `device:${CHIP}`;
  if (mayEmbed) return 'embedded';
  throw new ManagerError(
    'tpm-unreachable',
    `this host has no ${CHIP}. With the embedded TPM (--tpm embedded, or --yes-embedded) everything works, but ${NOT_HARDWARE_PROTECTED}. ` +
      'Choose it knowingly, or name a TPM with --tpm device:PATH or --tpm unix:PATH',
  );
}

function resultOf({ enrolment, recoveryKey, leftovers }: Initialised): InitResult {
  const { tpm, managerId, storeId } = enrolment;
  const { kind, path, manufacturer, firmwareVersion } = tpm;
  const warnings: string[] = [];
  if (kind === 'embedded') warnings.push(NOT_HARDWARE_PROTECTED);
  if (kind === 'unix') {
    warnings.push(`the root TPM is whatever serves ${path}: what it protects is as safe as that is`);
  }
  if (leftovers.length > 0) {
    const handles = leftovers.map((handle) => `0x${handle.toString(16).padStart(8, '0')}`).join(', ');
    warnings.push(
      `the TPM holds NV indices of other installations (${handles}). Where such an installation is gone for good, ` +
        'remove its index: tpm2_nvundefine HANDLE',
    );
  }
  return {
    managerId,
    tpm: { kind, path, manufacturer, firmwareVersion, hardwareProtected: kind === 'device' },
    storeId,
    pcrSelection: tpm.root.pcrSelection,
    recoveryKey,
    warnings,
  };
}
