/**
 * `usage`: the command line or the configuration cannot be used. `unreachable`: no vTPM answers at that socket.
 * `bad-command`: what was given is not one whole TPM command. `locality`: this channel cannot carry a locality.
 * `aborted`, `deadline`: the caller's wish. `protocol`: the other side broke the framing. `closed`: the connection
 * is gone, whoever ended it; a new one must be made.
 */
export type FrontendErrorCode =
  | 'usage'
  | 'unreachable'
  | 'bad-command'
  | 'locality'
  | 'aborted'
  | 'deadline'
  | 'protocol'
  | 'closed';

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
