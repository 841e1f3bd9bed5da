import { existsSync } from 'node:fs';
import { barrier, type Logger, type Paths } from 'vtpm-common';
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
import { resealGeneration } from './generation.js';
import { type KeyHierarchy, type RootKeys, wipe } from './keys/index.js';
import { acquireLock } from './lock.js';
import { openPlatform, type Platform, parseTpm } from './platform.js';
import { newRecoveryKey, openRecoveryBox } from './recovery-key.js';
import { type AnchorCounter, type RootTpmLocation, rootKeyFromInputs } from './root-tpm/index.js';
import { spoilAnchor, withLmdbStore } from './store/index.js';
import { type AcceptOptions, acceptStore, type RecoveredVtpm, surveyStore } from './store-acceptance.js';
import { hierarchy, rootKeysOf, type Unlocked, unlock, verifiedKeys } from './unlock.js';

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
  /** The authority that approved platform states has to be adopted again. */
  readonly needsAuthority: boolean;
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
    const unlocked = await unlock(platform.tpm, paths, file, readApprovals(paths));
    try {
      return await acceptOld(options, platform, unlocked);
    } finally {
      unlocked.keys.wipe();
    }
  } finally {
    await platform.close();
  }
}

async function acceptOld(
  options: RecoverOptions,
  { tpm }: Platform,
  { keys, enrolment, isRotating }: Unlocked,
): Promise<RecoverResult> {
  const paths = options.paths.manager;
  const { ownerAuth } = options;
  const counted = await countedBy(tpm.anchorCounter(enrolment.tpm, keys.anchorAuth));
  return await inStore(options, keys, 'rolled-back', async (accept) => {
    const { refusal, vtpms } = await surveyStore(accept, counted);
    const result = { refusal, vtpms, recoveryKey: undefined, needsAuthority: false };
    if (refusal === undefined || !options.acceptRollback) return { ...result, isDone: false };
    // Whatever the counter says from here on, no start takes the store before it is accepted as a whole.
    await spoilAnchor(accept.store, keys);
    let inForce = enrolment;
    if (counted === undefined) {
      const { planned } = enrolment;
      const write = isRotating ? writeNext : rewriteEnrolment;
      const renewed = await tpm.recreateAnchorCounter(enrolment.tpm, keys.anchorAuth, {
        ...(ownerAuth && { ownerAuth }),
        beforeDefine: (refs) =>
          write(paths, { ...enrolment, planned: [...planned, ...refs] }, keys.current.enrolmentMacKey),
      });
      barrier('recover.counter-made');
      inForce = { ...enrolment, tpm: renewed };
      write(paths, inForce, keys.current.enrolmentMacKey);
    }
    const accepted = await acceptStore(accept, tpm.anchorCounter(inForce.tpm, keys.anchorAuth));
    barrier('recover.accepted');
    // Everything is under the next generation alone; the next start erases the other.
    if (isRotating) adoptNext(paths);
    return { ...result, isDone: true, vtpms: goneOn(vtpms, accepted) };
  });
}

function goneOn(
  vtpms: readonly RecoveredVtpm[],
  accepted: ReadonlyMap<string, bigint>,
): readonly RecoveredVtpm[] {
  return vtpms.map((vtpm) => ({ ...vtpm, nextGeneration: accepted.get(vtpm.id) }));
}

/** undefined where the counter is gone, or another one is in its place. */
async function countedBy(counter: AnchorCounter): Promise<bigint | undefined> {
  try {
    return await counter.read();
  } catch (error) {
    const isGone = error instanceof ManagerError && ['anchor-removed', 'tpm-changed'].includes(error.code);
    if (!isGone) throw error;
    return undefined;
  }
}

/** The TPM that was enrolled is lost, or its platform policy for good: a TPM is enrolled anew. */
async function withoutTpm(options: RecoverOptions, recoveryKey: Buffer): Promise<RecoverResult> {
  const paths = options.paths.manager;
  const file = readEnrolment(paths);
  const old = file.enrolment;
  const next = readNext(paths);
  const keys = hierarchy(unbox(recoveryKey, file), old);
  const isLookedAt = options.acceptRollback || next !== undefined;
  let platform: Platform | undefined;
  try {
    const location = options.tpm === undefined ? old.tpm : parseTpm(options.tpm, paths);
    platform = isLookedAt ? await open(options, location) : undefined;
    if (next && platform) await releaseNext(recoveryKey, old, next, platform, keys, options.log);
    return await inStore(options, keys, 'recovered', async (accept) => {
      const { vtpms } = await surveyStore(accept, undefined);
      const refusal = 'the recovery key is used: whether the store is the newest cannot be known';
      const needsAuthority = old.tpm.root.policy.kind === 'authority';
      const result = { refusal, vtpms, needsAuthority };
      if (!options.acceptRollback || !platform) {
        return { ...result, isDone: false, recoveryKey: undefined };
      }
      const before = next ? [old, next.enrolment] : [old];
      const { enrolment, text } = await enrolAnew(options, platform, keys, before);
      barrier('recover.enrolled');
      await spoilAnchor(accept.store, keys);
      const counter = platform.tpm.anchorCounter(enrolment.tpm, keys.anchorAuth);
      const accepted = await acceptStore(accept, counter);
      barrier('recover.accepted');
      adoptNext(paths);
      return { ...result, isDone: true, recoveryKey: text, vtpms: goneOn(vtpms, accepted) };
    });
  } finally {
    await platform?.close();
    keys.wipe();
  }
}

/** Releases the root key without the TPM. @throws ManagerError `bad-request` where it is another recovery key */
export function unbox(recoveryKey: Uint8Array, { enrolment, verify }: UnverifiedEnrolment): RootKeys {
  const { installation, root } = enrolment.tpm;
  const inputs = openRecoveryBox(recoveryKey, enrolment.recovery, installation, root.generation);
  const rootKey = rootKeyFromInputs(inputs, Buffer.from(installation, 'hex'));
  wipe(inputs);
  return verifiedKeys(rootKey, { enrolment, verify });
}

/**
 * Adds the generations after the one in force. A rotation that was under way has the same recovery key. One of an earlier
 * recovery that was interrupted, or of several, has another that nobody saw: its TPM releases it.
 */
async function releaseNext(
  recoveryKey: Uint8Array,
  old: Enrolment,
  next: UnverifiedEnrolment,
  { tpm }: Platform,
  keys: KeyHierarchy,
  log: Logger,
): Promise<void> {
  try {
    return keys.advance(unbox(recoveryKey, next));
  } catch (error) {
    if (!(error instanceof ManagerError) || error.code !== 'bad-request') throw error;
  }
  const { enrolment } = next;
  const between = enrolment.erase.filter(({ generation }) => generation > old.tpm.root.generation);
  for (const root of [...between, enrolment.tpm.root]) {
    const facts = { storeId: enrolment.storeId, tpm: { ...enrolment.tpm, root } };
    try {
      const rootKey = await tpm.releaseRootKey(facts.tpm);
      keys.advance(rootKeysOf(rootKey, facts));
      wipe(rootKey);
    } catch (error) {
      // It may have come to nothing. What is under it says so when it is read.
      const { code, message } = ManagerError.from(error);
      log.warn(
        { reason: code },
        `an earlier recovery was interrupted, and the TPM does not release what it made: ${message}`,
      );
    }
  }
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
  const { enrolmentMacKey } = keys.ofGeneration(old.tpm.root.generation, 'the enrolment');
  const made = await tpm.enrol({
    installation: Buffer.from(old.tpm.installation, 'hex'),
    pcrSelection,
    srkHandle: old.tpm.srkHandle,
    anchorAuth: keys.anchorAuth,
    ...(ownerAuth && { ownerAuth }),
    beforeDefine: (refs) =>
      rewriteEnrolment(paths, { ...old, planned: [...old.planned, ...refs] }, enrolmentMacKey),
  });
  barrier('recover.made');
  try {
    const newest = Math.max(...before.map(({ tpm: { root } }) => root.generation));
    const generation = newest + 1;
    const tpmOfNext = { ...made.enrolment, root: { ...made.enrolment.root, generation } };
    const recovery = newRecoveryKey();
    const first = keys.generations.at(-1) ?? keys.current;
    const next = { ...made, enrolment: tpmOfNext };
    const { facts, root } = resealGeneration(next, old, first, recovery.publicKey);
    const { anchor, revocation } = facts.tpm;
    const inUse = new Set([anchor.name, revocation.name]);
    const enrolment: Enrolment = {
      ...old,
      ...facts,
      erase: before.flatMap(({ erase, tpm: { root: erased } }) => [...erase, erased]),
      // On another TPM a new counter may have the place, and with it the Name, of an old one.
      planned: before
        .flatMap(({ planned, tpm: { anchor, revocation } }) => [...planned, anchor, revocation])
        .map(({ handle, name }) => ({ handle, name }))
        .filter(({ name }) => !inUse.has(name)),
    };
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
  const mayMake = options.recoveryKey !== undefined && options.acceptRollback;
  const create = kind === 'embedded' && mayMake && !existsSync(paths.softtpm);
  return openPlatform({ kind, path }, paths, options.log, create, options.tpmDeadlineMs);
}

async function inStore(
  { paths, storeSandbox, log }: RecoverOptions,
  keys: KeyHierarchy,
  mark: AcceptOptions['mark'],
  body: (accept: AcceptOptions) => Promise<RecoverResult>,
): Promise<RecoverResult> {
  const directory = paths.manager.store;
  return await withLmdbStore({ directory, create: false, sandbox: storeSandbox, log }, (store) =>
    body({ store, keys, paths: paths.manager, log, mark }),
  );
}
