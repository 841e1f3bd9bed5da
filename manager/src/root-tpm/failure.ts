import { Rc, TpmError } from 'tpm2-ts-bindings';
import { ManagerError } from '../error.js';

/** Runs `body`; what the TPM client throws comes out as the manager's error. */
export async function translated<T>(body: () => Promise<T>): Promise<T> {
  try {
    return await body();
  } catch (error) {
    throw translate(error);
  }
}

function translate(error: unknown): ManagerError {
  if (!(error instanceof TpmError)) return ManagerError.from(error, 'root TPM');
  if (error.code === 'transport') {
    return new ManagerError('tpm-unreachable', `the root TPM does not answer: ${error.message}`, {
      cause: error,
    });
  }
  if (TpmError.is(error, Rc.LOCKOUT)) {
    return new ManagerError(
      'tpm-lockout',
      `the root TPM is locked against guessing of passwords (${error.message}): another program gave it wrong ones. ` +
        'Wait for its recovery time, or run tpm2_dictionarylockout --clear-lockout; nothing here tries again by itself',
      { cause: error },
    );
  }
  if (error.response?.retryable) {
    return new ManagerError(
      'tpm-busy',
      `the root TPM does not get to a command (${error.message}), however often it is asked again: ` +
        'find out what else uses it, then start again; --tpm-deadline says how long it is asked',
      { cause: error },
    );
  }
  if (TpmError.is(error, Rc.OBJECT_MEMORY, Rc.SESSION_MEMORY, Rc.SESSION_HANDLES, Rc.OBJECT_HANDLES)) {
    return new ManagerError(
      'tpm-fault',
      `the root TPM is full (${error.message}): another program left objects or sessions in it. ` +
        'Use /dev/tpmrm0, or remove them with tpm2_flushcontext',
      { cause: error },
    );
  }
  if (error.code === 'bad-hmac') {
    return new ManagerError(
      'tpm-fault',
      `an answer of the root TPM was changed on its way: ${error.message}`,
      { cause: error },
    );
  }
  return new ManagerError('tpm-fault', `the root TPM refused or failed: ${error.message}`, { cause: error });
}
