import { parseResponseCode, type ResponseCode } from './response-code.js';

/**
 * - `tpm`: the TPM answered with a response code, see `response`. Such answers carry no HMAC: hints, never evidence.
 * - `transport`: no answer: the device or socket failed, closed or was too slow. It cannot be used any more.
 * - `malformed`: an answer that is not what its command has, or a statement, key or secret from elsewhere that is not
 *   what it has to be.
 * - `bad-hmac`: the answer is not from the TPM that shares the session's key, or was changed on its way.
 * - `poisoned`: the session saw a failure before; nothing more is authorised with it.
 * - `usage`: the caller asked for what cannot be sent. Nothing was.
 * - `aborted`: the caller's signal came before the TPM executed anything. TPM, sessions and transport are as they were.
 */
export type TpmErrorCode = 'tpm' | 'transport' | 'malformed' | 'bad-hmac' | 'poisoned' | 'usage' | 'aborted';

/** The one error class of this package. */
export class TpmError extends Error {
  override readonly name = 'TpmError';
  /** Only with code `tpm`. */
  readonly response: ResponseCode | undefined;
  constructor(
    readonly code: TpmErrorCode,
    message: string,
    options?: { cause?: unknown; response?: ResponseCode },
  ) {
    super(message, options?.cause === undefined ? undefined : { cause: options.cause });
    this.response = options?.response;
  }

  /** For the response code of a command. */
  static fromResponse(command: string, rc: number): TpmError {
    const response = parseResponseCode(rc);
    const { name, subject, index, text } = response;
    const about = index === 0 ? '' : ` (${subject} ${index})`;
    const meaning = text === '' ? '' : `: ${text}`;
    return new TpmError('tpm', `TPM2_${command}: ${name}${about}${meaning}`, { response });
  }

  /** True where the TPM answered with one of these codes, whatever handle, parameter or session it is about. */
  static is(error: unknown, ...canonical: readonly number[]): error is TpmError & { response: ResponseCode } {
    return (
      error instanceof TpmError &&
      error.response !== undefined &&
      canonical.includes(error.response.canonical)
    );
  }
}
