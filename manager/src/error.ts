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
  | 'newer-format'
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
  | 'retired'
  | 'fenced'
  | 'busy'
  | 'too-large'
  | 'rate-limited'
  | 'deadline'
  | 'shutting-down'
  | 'internal';

/** The one error class of the manager. The message is a sentence that says what to do; it holds no secret. */
export class ManagerError extends Error {
  override readonly name = 'ManagerError';
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
    const unwritable = ofFileSystem(unknown);
    if (unwritable) return unwritable;
    return new ManagerError(
      'internal',
      `${context}: ${unknown instanceof Error ? unknown.message : String(unknown)}`,
      { cause: unknown },
    );
  }
}

/** What a disk that is full, read-only or not ours answers to opening, making and removing files. */
function ofFileSystem(unknown: unknown): ManagerError | undefined {
  if (!(unknown instanceof Error)) return undefined;
  const { code, path, syscall, message } = unknown as NodeJS.ErrnoException;
  if (code === 'ENOSPC' || code === 'EDQUOT') {
    return new ManagerError(
      'store-full',
      `${path ?? 'a file'} cannot be written: its disk is full; make room`,
      {
        cause: unknown,
      },
    );
  }
  // Of a socket these say who may connect, not what may be written.
  if (
    path !== undefined &&
    syscall !== 'connect' &&
    (code === 'EROFS' || code === 'EACCES' || code === 'EPERM')
  ) {
    return new ManagerError(
      'home-unwritable',
      `${path} cannot be written (${message}): mount it writable, and see that it belongs to the manager's user`,
      { cause: unknown },
    );
  }
  return undefined;
}
