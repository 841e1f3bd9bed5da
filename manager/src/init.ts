import { randomBytes, randomFillSync } from 'node:crypto';
import { existsSync, rmSync } from 'node:fs';
import { type Logger, type Paths, privateDirectory } from 'vtpm-common';
import {
  checkNotEnrolled,
  type Enrolment,
  finishEnrolment,
  unfinishedPath,
  writeUnfinished,
} from './enrolment.js';
import { ManagerError } from './error.js';
import { deriveKeys, wipe } from './keys/index.js';
import { secretBuffer } from './keys/secret.js';
import { acquireLock } from './lock.js';
import { NOT_HARDWARE_PROTECTED, openPlatform, parseTpm } from './platform.js';
import type { RootTpm, RootTpmEnrolment } from './root-tpm/index.js';
import { createAnchoredStore, openLmdbStore } from './store/index.js';
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
      const { enrolment, leftovers } = await enrol(options, location);
      return resultOf(enrolment, leftovers);
    } catch (error) {
      rmSync(paths.store, { recursive: true, force: true });
      rmSync(paths.softtpm, { recursive: true, force: true });
      throw error;
    }
  } finally {
    release();
  }
}

async function enrol(
  options: InitOptions,
  location: ReturnType<typeof parseTpm>,
): Promise<{ enrolment: Enrolment; leftovers: readonly number[] }> {
  const paths = options.paths.manager;
  const platform = await openPlatform(location, paths, options.log, true, options.tpmDeadlineMs);
  try {
    const installation = randomBytes(16);
    const storeId = randomBytes(16);
    const anchorAuth = randomFillSync(secretBuffer(32));
    const {
      enrolment: tpm,
      rootKey,
      recoveryInputs,
      leftovers,
    } = await platform.tpm.enrol({
      installation,
      pcrSelection: options.pcrSelection,
      srkHandle: options.srkHandle,
      anchorAuth,
      ...(options.ownerAuth && { ownerAuth: options.ownerAuth }),
    });
    const keys = deriveKeys(rootKey, storeId);
    wipe(rootKey, recoveryInputs, anchorAuth);
    try {
      const enrolment: Enrolment = {
        format: 1,
        createdAt: new Date().toISOString(),
        managerId: Buffer.from(keys.identity.publicKey).toString('hex'),
        storeId: storeId.toString('hex'),
        tpm,
      };
      writeUnfinished(paths, enrolment, keys.enrolmentMacKey);
      await makeStore(options, keys);
      finishEnrolment(paths);
      return { enrolment, leftovers };
    } catch (error) {
      await takeBack(options, platform.tpm, tpm);
      throw error;
    } finally {
      keys.wipe();
    }
  } finally {
    wipe(options.ownerAuth);
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

async function makeStore(options: InitOptions, keys: ReturnType<typeof deriveKeys>): Promise<void> {
  const raw = await openLmdbStore({
    directory: options.paths.manager.store,
    create: true,
    sandbox: options.storeSandbox,
    log: options.log,
    onLost: () => undefined,
  });
  try {
    const store = await createAnchoredStore(raw, keys);
    await createTrustStore(keys, store, options.toolstackKey, BigInt(Date.now()));
    await store.close();
  } finally {
    await raw.close();
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

function resultOf({ tpm, managerId, storeId }: Enrolment, leftovers: readonly number[]): InitResult {
  const { kind, path, manufacturer, firmwareVersion } = tpm;
  const { pcrSelection } = tpm.root;
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
    pcrSelection,
    warnings,
  };
}
