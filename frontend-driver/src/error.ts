/**
 * `usage`: the command line or the configuration cannot be used. `unreachable`: no vTPM answers at that socket.
 * `bad-command`: what was given is not one whole TPM command. `locality`: this channel cannot carry that locality.
 * `aborted`, `deadline`: the caller's wish. `protocol`: the other side broke the framing. `refused`: the vTPM does not take
 * the ring, and says why. `closed`: the connection is gone, whoever ended it, and the command was not sent; a new one must be
 * made. `lost`: the same after the command was sent: whether it ran is not known. `internal`: a system call failed.
 */
export type FrontendErrorCode =
  | 'usage'
  | 'unreachable'
  | 'bad-command'
  | 'locality'
  | 'aborted'
  | 'deadline'
  | 'protocol'
  | 'refused'
  | 'closed'
  | 'lost'
  | 'internal';

/** The one error class of this package. Messages hold no command or answer bytes. */
export class FrontendError extends Error {
  override readonly name = 'FrontendError';
  constructor(
    readonly code: FrontendErrorCode,
    message: string,
    cause?: unknown,
  ) {
    super(message, cause === undefined ? undefined : { cause });
  }
}
