import type { VtpmdError, VtpmdErrorCode } from '../error.js';

/** Results of the control protocol (libtpms's tpm_error.h) that tell VMMs why a state blob was refused. */
const RESULT: Readonly<Partial<Record<VtpmdErrorCode, number>>> = {
  // TPM_BAD_PARAMETER
  'blob-malformed': 0x03,
  // TPM_KEYNOTFOUND, as swtpm has it
  'blob-encrypted': 0x0d,
  // TPM_DISABLED_CMD
  'plain-forbidden': 0x08,
  // TPM_BAD_TYPE, as swtpm has it
  'newer-format': 0x34,
};
const FAIL = 0x09;

/** TPM_RESULT of a refused GET_STATEBLOB, SET_STATEBLOB, INIT or LOCK_STORAGE; the worker's log has the sentence. */
export function resultOf({ code }: VtpmdError): number {
  return RESULT[code] ?? FAIL;
}
