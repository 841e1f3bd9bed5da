import { concat, u32Bytes } from '../bytes.js';
import type { Framing } from './stream.js';
import { transportError } from './transport.js';

/** Commands of swtpm's control channel (swtpm, include/swtpm/tpm_ioctl.h: PTM and CMD_*; swtpm_ioctls(3)). */
export const ControlCommand = {
  GET_CAPABILITY: 0x01,
  INIT: 0x02,
  SHUTDOWN: 0x03,
  GET_TPMESTABLISHED: 0x04,
  SET_LOCALITY: 0x05,
  HASH_START: 0x06,
  HASH_DATA: 0x07,
  HASH_END: 0x08,
  CANCEL_TPM_CMD: 0x09,
  RESET_TPMESTABLISHED: 0x0b,
  STOP: 0x0e,
} as const;

/** What a swtpm can do: bits of the answer to CMD_GET_CAPABILITY (tpm_ioctl.h: PTM_CAP_*). */
export const ControlCapability = {
  INIT: 1 << 0,
  SHUTDOWN: 1 << 1,
  GET_TPMESTABLISHED: 1 << 2,
  SET_LOCALITY: 1 << 3,
  HASHING: 1 << 4,
  CANCEL_TPM_CMD: 1 << 5,
  STORE_VOLATILE: 1 << 6,
  RESET_TPMESTABLISHED: 1 << 7,
  GET_STATEBLOB: 1 << 8,
  SET_STATEBLOB: 1 << 9,
  STOP: 1 << 10,
  GET_CONFIG: 1 << 11,
  SET_DATAFD: 1 << 12,
  SET_BUFFERSIZE: 1 << 13,
  GET_INFO: 1 << 14,
  SEND_COMMAND_HEADER: 1 << 15,
  LOCK_STORAGE: 1 << 16,
} as const;

/** Of CMD_INIT (tpm_ioctl.h: PTM_INIT_FLAG_DELETE_VOLATILE): the stored volatile state is removed once it was read. */
export const DELETE_VOLATILE = 1;

/** One control command: its number, what follows it, and how many bytes a successful answer has after the result. */
export interface ControlRequest {
  readonly name: keyof typeof ControlCommand;
  readonly body?: Uint8Array;
  readonly answer: number;
}

/** u32 command, then the body; all numbers big-endian. */
export function encodeControl(request: ControlRequest): Buffer {
  return concat(u32Bytes(ControlCommand[request.name]), request.body ?? new Uint8Array(0));
}

const RESULT = 4;

/**
 * u32 result, then the rest of a successful answer. swtpm leaves the rest out where the result is an error; servers for
 * peers that always read all of it send zeros there, in the same write.
 */
export function controlFraming(request: ControlRequest): Framing {
  const whole = RESULT + request.answer;
  return (received) => {
    if (received.length < RESULT) return undefined;
    if (received.readUInt32BE(0) === 0) return whole;
    return received.length === whole ? whole : RESULT;
  };
}

/** Results (TPM 1.2 codes, which the control channel has kept). */
const RESULT_NAMES: Readonly<Record<number, string>> = {
  3: 'TPM_BAD_PARAMETER',
  9: 'TPM_FAIL',
  10: 'TPM_BAD_ORDINAL: not while the TPM is in this state, or not known to this server',
  31: 'TPM_IOERROR',
  61: 'TPM_BAD_LOCALITY',
};

/** What follows the result. @throws TpmError `transport` that names command and result, where that is an error */
export function decodeControl(request: ControlRequest, answer: Buffer): Buffer {
  const result = answer.readUInt32BE(0);
  if (result === 0) return answer.subarray(RESULT);
  const name = RESULT_NAMES[result];
  throw transportError(
    `swtpm control: CMD_${request.name} was refused with 0x${result.toString(16)}${name === undefined ? '' : ` (${name})`}`,
  );
}
