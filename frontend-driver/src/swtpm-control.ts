/** Commands of swtpm's control protocol that tpm2-tss's swtpm TCTI sends (u32, big-endian). */
const CMD = {
  GetCapability: 0x01,
  GetTpmEstablished: 0x04,
  SetLocality: 0x05,
  CancelTpmCommand: 0x09,
} as const;

/** Capability bits: GET_TPMESTABLISHED and SET_LOCALITY, CANCEL_TPM_CMD. */
const CAPABILITIES = (1 << 2) | (1 << 3);
const CANCELS = 1 << 5;

/** Results (TPM 1.2 codes). */
const SUCCESS = 0;
const BAD_PARAMETER = 0x03;
const BAD_ORDINAL = 0x0a;
const BAD_LOCALITY = 61;

export interface ControlTarget {
  /** @returns whether it can be had */
  setLocality(locality: number): boolean;
  /** Cancels what runs; absent where that cannot be done. */
  readonly cancel: (() => void) | undefined;
}

/** The answer to one control request. Power and state are not a client's of this bridge: BAD_ORDINAL, as what is not known. */
export function answerControl(request: Buffer, target: ControlTarget): Buffer {
  if (request.length < 4) return words(BAD_PARAMETER);
  switch (request.readUInt32BE(0)) {
    case CMD.GetCapability:
      return words(SUCCESS, CAPABILITIES | (target.cancel ? CANCELS : 0));
    case CMD.GetTpmEstablished:
      // What a dynamic root of trust measured is not known on this side of a door.
      return words(SUCCESS, 0);
    case CMD.SetLocality:
      // One byte; some clients pad it to four.
      if (request.length < 5) return words(BAD_PARAMETER);
      return words(target.setLocality(request.readUInt8(4)) ? SUCCESS : BAD_LOCALITY);
    case CMD.CancelTpmCommand:
      target.cancel?.();
      return words(target.cancel ? SUCCESS : BAD_ORDINAL);
    default:
      return words(BAD_ORDINAL);
  }
}

function words(...values: number[]): Buffer {
  const out = Buffer.alloc(4 * values.length);
  for (const [index, value] of values.entries()) out.writeUInt32BE(value, 4 * index);
  return out;
}
