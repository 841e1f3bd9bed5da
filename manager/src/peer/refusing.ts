import { TpmError } from 'tpm2-ts-bindings';
import { ManagerError, type ManagerErrorCode } from '../error.js';

/** How a key of another host is refused. @param what the key is called */
export function refusing(code: ManagerErrorCode, what: string) {
  const refused = (why: string, cause?: unknown): ManagerError =>
    new ManagerError(code, `the ${what} of the other host ${why}`, { cause });
  /** Runs what reads it: a TPM's structure that cannot be is a refusal. */
  const asRefusal = <T>(body: () => T): T => {
    try {
      return body();
    } catch (error) {
      if (!(error instanceof TpmError)) throw error;
      throw refused(`is not acceptable: ${error.message}`, error);
    }
  };
  return { refused, asRefusal };
}
