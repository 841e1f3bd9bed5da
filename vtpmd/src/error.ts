/** Why a worker or the embedded TPM refuses or stops. `refused`: by the manager, whose own reason is in `reason`. */
export type VtpmdErrorCode =
  | 'libtpms-missing'
  | 'engine'
  | 'state-missing'
  | 'state-corrupt'
  | 'state-exists'
  | 'newer-format'
  | 'in-use'
  | 'bad-arguments'
  | 'protocol'
  | 'link-lost'
  | 'refused'
  | 'fenced'
  | 'startup-failed'
  | 'no-checkpoint'
  | 'manager-away'
  // State that a VMM brings in
  | 'blob-malformed'
  | 'blob-encrypted'
  | 'blob-refused'
  | 'blob-incomplete'
  | 'plain-forbidden'
  | 'reference-foreign'
  | 'reference-used'
  // The TPM is at another host, or on its way
  | 'tpm-away'
  | 'internal';

/** The one error class of this package. The message says what happened and holds no secret. */
export class VtpmdError extends Error {
  override readonly name: string = 'VtpmdError';
  constructor(
    readonly code: VtpmdErrorCode,
    message: string,
    options?: { cause?: unknown; managerReason?: string },
  ) {
    super(message, options?.cause === undefined ? undefined : { cause: options.cause });
    this.reason = options?.managerReason ?? code;
  }

  /** The machine-readable reason for the supervisor: the manager's (`stale-epoch`, …) where it refused. */
  readonly reason: string;

  /** Anything caught, as a VtpmdError. */
  static from(unknown: unknown): VtpmdError {
    if (unknown instanceof VtpmdError) return unknown;
    return new VtpmdError('internal', unknown instanceof Error ? unknown.message : String(unknown), {
      cause: unknown,
    });
  }
}
