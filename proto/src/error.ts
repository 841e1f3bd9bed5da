/** `malformed`: not a message of its type. `forged`: a signature, box or tag does not verify. `newer-format`: written by a newer version. */
export type ProtoErrorCode = 'malformed' | 'forged' | 'newer-format';

/** The one error class of this package. */
export class ProtoError extends Error {
  override readonly name = 'ProtoError';
  constructor(
    readonly code: ProtoErrorCode,
    message: string,
    cause?: unknown,
  ) {
    super(message, cause === undefined ? undefined : { cause });
  }
}
