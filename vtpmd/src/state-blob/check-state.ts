import { loadLibtpms, TPM_BAD_VERSION, TPM_SUCCESS } from '../engine/libtpms.js';
import { VtpmdError } from '../error.js';

/**
 * Whether libtpms reads a state, so that a VMM hears it before it powers the TPM on. Only while the TPM is off.
 * @throws VtpmdError `newer-format`, `blob-refused`
 */
export function checkState(permanent: Uint8Array, volatile?: Uint8Array): void {
  const result = loadLibtpms().testState(permanent, volatile);
  if (result === TPM_SUCCESS) return;
  const what = `libtpms ${loadLibtpms().version} does not read the ${volatile ? 'volatile' : 'permanent'} state`;
  if (result === TPM_BAD_VERSION) {
    throw new VtpmdError('newer-format', `${what}: a newer one made it; install that`);
  }
  throw new VtpmdError('blob-refused', `${what} (TPMLIB_SetState: 0x${result.toString(16)}): it is damaged`);
}
