/** Results of the control protocol: those of TPM 1.2 (TPM Main, part 2, section 16), as libtpms has them. */
export const RESULT = {
  Success: 0,
  BadParameter: 0x03,
  /** The TPM is not in the state that the command needs, or the command is not known. */
  BadOrdinal: 0x0a,
  Fail: 0x09,
  KeyNotFound: 0x0d,
  IoError: 0x1f,
  DecryptError: 0x21,
  BadType: 0x34,
  BadLocality: 0x3d,
  /** There is no such state. */
  Retry: 0x800,
} as const;

/** A control command is refused: the VMM gets the result, the log the message. */
export class ControlRefusal extends Error {
  override readonly name = 'ControlRefusal';
  constructor(
    readonly result: number,
    message: string,
    options?: { cause?: unknown },
  ) {
    super(message, options);
  }
}
