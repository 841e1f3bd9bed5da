import type { Actions, Outcome, VmmState } from './actions.js';
import { type CommonParts, commonActions, DONE } from './common-actions.js';
import { ControlRefusal, RESULT } from './results.js';

export interface LostParts extends Omit<CommonParts, 'bufferSizeChanged' | 'isOn'> {
  readonly vmm: VmmState;
  /** Asks the supervisor for a worker with a new run of the VM: this one ends then. Resolves where it gives none. */
  reset(): Promise<void>;
}

function gone(): Outcome {
  throw new ControlRefusal(RESULT.Fail, 'the state of this TPM is lost until its VM is reset');
}

/**
 * The commands for a TPM whose volatile state is lost. It counts as off: the VMM may cut its power, and with INIT, the signal
 * that the VM begins anew, it gets another worker with a new run of the VM. That one finds the same INIT in the socket.
 */
export function lostActions(parts: LostParts): Actions {
  return {
    ...commonActions({ ...parts, isOn: () => false, bufferSizeChanged: () => {} }),
    INIT: async () => {
      await parts.reset();
      return gone();
    },
    STOP: () => DONE,
    SHUTDOWN: () => DONE,
    GET_TPMESTABLISHED: gone,
    RESET_TPMESTABLISHED: gone,
    CANCEL_TPM_CMD: gone,
    HASH_START: gone,
    HASH_DATA: gone,
    HASH_END: gone,
    STORE_VOLATILE: gone,
    GET_STATEBLOB: gone,
    SET_STATEBLOB: gone,
    LOCK_STORAGE: () => DONE,
  };
}
