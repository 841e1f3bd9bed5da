import { RESULT } from '../control/results.js';
import type { VtpmdError, VtpmdErrorCode } from '../error.js';

/** As swtpm has them, where it knows the like. */
const RESULTS: Readonly<Partial<Record<VtpmdErrorCode, number>>> = {
  'blob-malformed': RESULT.BadParameter,
  'blob-encrypted': RESULT.KeyNotFound,
  'newer-format': RESULT.BadType,
};

/** Why a GET_STATEBLOB, SET_STATEBLOB, INIT or LOCK_STORAGE was refused; the worker's log has the sentence. */
export function resultOf({ code }: VtpmdError): number {
  return RESULTS[code] ?? RESULT.Fail;
}
