import { fileSystemFailure } from 'vtpm-common';

/**
 * Why the manager refuses or fails. The code is the machine-readable reason in gRPC details, admin answers and logs.
 */
export type ManagerErrorCode =
  // Start and platform
  | 'not-initialised'
  | 'already-initialised'
  | 'in-use'
  | 'locked'
  | 'platform-policy'
  | 'tpm-changed'
  | 'tpm-emptied'
  | 'anchor-removed'
  | 'tpm-unfit'
  | 'tpm-unreachable'
  | 'tpm-fault'
  | 'tpm-busy'
  | 'tpm-lockout'
  | 'home-unwritable'
  // Store
  | 'store-missing'
  | 'store-corrupt'
  | 'store-full'
  | 'rollback-detected'
  | 'audit-corrupt'
  | 'newer-format'
  | 'older-format'
  | 'stale'
  // Identity and ownership
  | 'bad-request'
  | 'ticket-forged'
  | 'ticket-expired'
  | 'wrong-manager'
  | 'wrong-worker'
  | 'wrong-vm'
  | 'unknown-toolstack-key'
  | 'image-not-allowed'
  | 'stale-epoch'
  | 'verb-missing'
  | 'already-manufactured'
  | 'unknown-vtpm'
  | 'unknown-image'
  | 'unknown-call'
  | 'wrong-method'
  | 'retired'
  | 'fenced'
  // Other hosts, and vTPMs on their way to or from them
  | 'unknown-peer'
  | 'peer-exists'
  | 'peer-unattested'
  | 'peer-platform'
  | 'approval-stale'
  | 'peer-restarted'
  | 'peer-ek'
  | 'peer-ak'
  | 'peer-import-key'
  | 'peer-unreachable'
  | 'peer-late'
  | 'import-key-lost'
  | 'migrating'
  | 'moved'
  | 'incompatible'
  | 'incomplete'
  | 'wrong-identifier'
  | 'wrong-reference'
  | 'migration-refused'
  | 'migration-aborted'
  | 'no-toolstack'
  | 'in-doubt'
  | 'decision-forged'
  | 'unknown-migration'
  | 'not-fenced'
  | 'lives-here'
  | 'busy'
  | 'too-large'
  | 'rate-limited'
  | 'deadline'
  | 'peer-forbidden'
  | 'peer-closed'
  | 'shutting-down'
  | 'internal';

/** The one error class of the manager. The message is a sentence that says what to do; it holds no secret. */
export class ManagerError extends Error {
  override readonly name = 'ManagerError';
  /** Whoever began the change has its failure in the audit log already. */
  isAudited = false;
  constructor(
    readonly code: ManagerErrorCode,
    message: string,
    options?: { cause?: unknown },
  ) {
    super(message, options);
  }

  /** Anything caught, as a ManagerError. */
  static from(unknown: unknown, context = 'unexpected failure'): ManagerError {
    if (unknown instanceof ManagerError) return unknown;
    const failure = fileSystemFailure(unknown, "the manager's user");
    if (failure) return new ManagerError(failure.code, failure.message, { cause: unknown });
    return new ManagerError(
      'internal',
      `${context}: ${unknown instanceof Error ? unknown.message : String(unknown)}`,
      { cause: unknown },
    );
  }
}
