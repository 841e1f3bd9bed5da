import type { Logger, Paths } from 'vtpm-common';
import { readApprovals } from './approvals-file.js';
import { type AuditVerdictView, verifyAudit, verifyChain, viewOf } from './audit/index.js';
import { readEnrolment } from './enrolment.js';
import { ManagerError } from './error.js';
import type { KeyHierarchy } from './keys/index.js';
import { acquireLock } from './lock.js';
import { openPlatform } from './platform.js';
import { auditKeys } from './service.js';
import { readAnchor, withLmdbStore } from './store/index.js';
import { unlock } from './unlock.js';

export interface AuditCheckOptions {
  readonly paths: Paths;
  readonly log: Logger;
  readonly storeSandbox: boolean;
  readonly tpmDeadlineMs: number;
}

/**
 * Verifies the audit log with the manager stopped. Where the TPM does not release the keys, or the store has no anchor
 * of this installation, the chain alone, which is said. Changes nothing.
 * @throws ManagerError `in-use` while the manager runs, and where the files cannot be read
 */
export async function checkAudit(options: AuditCheckOptions): Promise<AuditVerdictView> {
  const paths = options.paths.manager;
  const release = acquireLock(paths);
  try {
    let because: string;
    try {
      return await withKeys(options, (keys) => againstAnchor(options, keys));
    } catch (error) {
      if (!(error instanceof ManagerError)) throw error;
      because = error.message;
    }
    return viewOf(await verifyChain(paths.audit), because);
  } finally {
    release();
  }
}

async function againstAnchor(
  { paths, storeSandbox, log }: AuditCheckOptions,
  keys: KeyHierarchy,
): Promise<AuditVerdictView> {
  const directory = paths.manager.store;
  const anchor = await withLmdbStore({ directory, create: false, sandbox: storeSandbox, log }, (store) =>
    readAnchor(store, keys),
  );
  if (!anchor) {
    throw new ManagerError(
      'store-corrupt',
      'the store has no anchor, or one that is not of this installation',
    );
  }
  return viewOf(await verifyAudit(paths.manager.audit, auditKeys(keys), anchor.audit));
}

async function withKeys<T>(
  { paths, log, tpmDeadlineMs }: AuditCheckOptions,
  body: (keys: KeyHierarchy) => Promise<T>,
): Promise<T> {
  const file = readEnrolment(paths.manager);
  const { kind, path } = file.enrolment.tpm;
  const platform = await openPlatform({ kind, path }, paths.manager, log, false, tpmDeadlineMs);
  try {
    const { keys } = await unlock(platform.tpm, paths.manager, file, readApprovals(paths.manager));
    try {
      return await body(keys);
    } finally {
      keys.wipe();
    }
  } finally {
    await platform.close();
  }
}

/** One line for each thing that there is to say. */
export function describeAudit(view: AuditVerdictView): string[] {
  const { checked, because, first, last, authenticated, unanchored, torn, flaw } = view;
  return [
    flaw ? `DAMAGED   entry ${flaw.entry} of ${flaw.path} ${flaw.what}` : 'whole',
    `entries   ${first} to ${last}, ${authenticated} of them by MAC too`,
    ...(checked === 'chain' ? [`no keys   only the chain was verified: ${because}`] : []),
    ...(unanchored > 0
      ? [`newer     ${unanchored} than the anchor: what they speak of may not have happened`]
      : []),
    ...(torn ? [`torn      ${torn.path} ends with a part of an entry that was never acknowledged`] : []),
  ];
}
