import { VtpmdError } from '../error.js';
import type { EngineState, TpmEngine } from './engine.js';
import { createLibtpmsEngine } from './libtpms-engine.js';

/**
 * Powers a TPM on (the equivalent of _TPM_Init; TPM2_Startup is still to be sent).
 * @throws VtpmdError `libtpms-missing`, `state-missing`, `state-exists`, `engine`
 */
export function startEngine(state: EngineState): TpmEngine {
  if (!state.permanent && !state.manufacture) {
    throw new VtpmdError('state-missing', 'there is no permanent state, and no permission to make a new TPM');
  }
  if (state.permanent && state.manufacture) {
    throw new VtpmdError('state-exists', 'there is permanent state: a new TPM would replace it');
  }
  const engine = createLibtpmsEngine();
  try {
    engine.powerOn(state);
    return engine;
  } catch (error) {
    engine.terminate();
    throw error;
  }
}
