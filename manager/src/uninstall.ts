import { existsSync, rmdirSync, rmSync } from 'node:fs';
import { type Logger, type Paths, syncDirectory } from 'vtpm-common';
import {
  finishEnrolment,
  isMissingOrEmpty,
  markUnfinished,
  nextPath,
  readEnrolmentText,
  readUnfinished,
  unfinishedPath,
} from './enrolment.js';
import { ManagerError } from './error.js';
import { acquireLock } from './lock.js';
import { openPlatform } from './platform.js';
import { isTombstone, vtpmOfKey } from './records/index.js';
import type { RootTpmEnrolment, Withdrawal } from './root-tpm/index.js';
import { withLmdbStore } from './store/index.js';

export interface UninstallOptions {
  readonly paths: Paths;
  readonly log: Logger;
  readonly storeSandbox: boolean;
  readonly tpmDeadlineMs: number;
  readonly ownerAuth: Uint8Array | undefined;
  readonly evict: boolean;
  /** Goes on where the TPM or the store is gone for good; what cannot be reached is left. */
  readonly force: boolean;
}

/** A phrase for people each. */
export interface UninstallResult {
  readonly removed: readonly string[];
  readonly left: readonly string[];
}

const PAGE_RECORDS = 64;

/**
 * Removes what init made: first the enrolment is put aside, so that no manager starts any more, then the TPM's part,
 * then the store, last the enrolment that was put aside. It tells a repetition what is left to do wherever this ended.
 * An init that was interrupted is cleaned up in the same way.
 * @throws ManagerError `in-use`, `not-initialised`, `busy` where vTPMs exist (named), or the TPM's
 */
export async function uninstall(options: UninstallOptions): Promise<UninstallResult> {
  const paths = options.paths.manager;
  if (!existsSync(paths.directory)) {
    throw new ManagerError(
      'not-initialised',
      `there is no ${paths.directory}: nothing of a manager to remove`,
    );
  }
  const release = acquireLock(paths);
  try {
    const { enrolment } = existsSync(paths.enrolment) ? readEnrolmentText(paths) : {};
    if (enrolment) {
      await refuseWhileUsed(options);
      markUnfinished(paths);
    }
    const tpm = enrolment?.tpm ?? readUnfinished(paths)?.tpm;
    if (!tpm && !isMissingOrEmpty(paths.store)) {
      throw new ManagerError(
        'not-initialised',
        `there is a store ${paths.store} but no ${paths.enrolment}; restore the enrolment from a backup. ` +
          'If nothing of it is needed any more, remove the directory by hand',
      );
    }
    const { removed, left } = tpm
      ? await withdraw(options, tpm).catch((error: unknown) => {
          // Nothing was taken out: the installation is whole, and starts as before.
          if (enrolment) finishEnrolment(paths);
          throw error;
        })
      : { removed: [], left: [] };
    return { removed: [...removed, ...removeFiles(paths)], left };
  } finally {
    release();
    // Last of all, and only where nothing of others is in it.
    removeEmptyDirectory(paths);
  }
}

/** Without keys: it must work where the platform or the TPM no longer releases them. */
async function refuseWhileUsed({ paths, log, storeSandbox, force }: UninstallOptions): Promise<void> {
  const directory = paths.manager.store;
  if (isMissingOrEmpty(directory)) {
    if (force) return;
    throw new ManagerError(
      'store-missing',
      `the store ${directory} is missing or empty, so nobody knows whether vTPMs depend on this installation: ` +
        'bring it back (is a file system not mounted?), or add --force',
    );
  }
  const live: string[] = [];
  try {
    await withLmdbStore({ directory, create: false, sandbox: storeSandbox, log }, async (store) => {
      for (let after: string | undefined; ; ) {
        const page = await store.list(after, PAGE_RECORDS);
        for (const { key, value } of page) {
          const id = vtpmOfKey(key);
          // What cannot be read counts as a vTPM.
          if (id !== undefined && !isTombstone(value)) live.push(id);
        }
        const last = page.at(-1)?.key;
        if (last === undefined || (after !== undefined && last <= after)) break;
        after = last;
      }
    });
  } catch (error) {
    if (!force) throw error;
    log.warn({ reason: String(error) }, 'the store cannot be read');
    return;
  }
  if (live.length > 0) {
    throw new ManagerError(
      'busy',
      `${live.length === 1 ? 'a vTPM exists' : `${live.length} vTPMs exist`} here: ${live.join(', ')}. ` +
        'Their keys would be lost for good; delete them first: vtpmctl delete ID',
    );
  }
}

async function withdraw(options: UninstallOptions, enrolment: RootTpmEnrolment): Promise<Withdrawal> {
  // The embedded TPM goes as a whole, with its files.
  if (enrolment.kind === 'embedded') return { removed: [], left: [] };
  try {
    const platform = await openPlatform(
      { kind: enrolment.kind, path: enrolment.path },
      options.paths.manager,
      options.log,
      false,
      options.tpmDeadlineMs,
    );
    try {
      const { ownerAuth, evict } = options;
      return await platform.tpm.withdraw(enrolment, { ...(ownerAuth && { ownerAuth }), evict });
    } finally {
      await platform.close();
    }
  } catch (caught) {
    const error = ManagerError.from(caught);
    if (!options.force) {
      throw new ManagerError(
        error.code,
        `${error.message}. Nothing was removed: repeat when the TPM answers, or add --force to leave it as it is`,
        { cause: error },
      );
    }
    return { removed: [], left: [`everything in the TPM ${enrolment.path}: ${error.message}`] };
  }
}

function removeFiles(paths: Paths['manager']): string[] {
  const removed: string[] = [];
  for (const [path, what] of [
    [paths.store, 'the store of vTPM states'],
    [paths.softtpm, 'the embedded TPM'],
    [paths.approvals, 'the approvals of platform states'],
    [paths.audit, 'the audit log'],
    [nextPath(paths), 'the enrolment of a rotation under way'],
    [unfinishedPath(paths), 'the enrolment with the sealed half of the root key'],
  ] as const) {
    if (!existsSync(path)) continue;
    rmSync(path, { recursive: true, force: true });
    // The next one only when this is gone for good: the enrolment put aside has to be the last.
    syncDirectory(paths.directory);
    removed.push(`${what}, ${path}`);
  }
  rmSync(paths.lock, { force: true });
  return removed;
}

function removeEmptyDirectory({ directory }: Paths['manager']): void {
  try {
    rmdirSync(directory);
  } catch {
    // Something is left in it, which the caller lists.
  }
}
