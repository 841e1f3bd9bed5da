import { namedPcrs, type PcrValues, Rc, readPcrs, type Session, type Tpm, TpmError } from 'tpm2-ts-bindings';
import { ManagerError } from '../error.js';
import { readSelection } from './enrolment.js';

/**
 * The values of a selection now, by name.
 * @param session proves them; without one they are a hint
 * @throws ManagerError `tpm-unfit` where the TPM has no such PCRs
 */
export async function readPcrState(tpm: Tpm, pcrSelection: string, session?: Session): Promise<PcrValues> {
  const selection = readSelection(pcrSelection);
  try {
    return namedPcrs(selection, await readPcrs(tpm, selection, session === undefined ? [] : [session]));
  } catch (error) {
    if (!(error instanceof TpmError && (error.code === 'usage' || TpmError.is(error, Rc.HASH, Rc.VALUE)))) {
      throw error;
    }
    throw new ManagerError('tpm-unfit', `${error.message}; choose other PCRs with --pcrs`, { cause: error });
  }
}
