import type { PowerNotes } from '../checkpoint/unit.js';
import { commandCode, responseCode, TPM_CC, TPM_RC_SUCCESS } from '../engine/command.js';

/** Whether the TPM is on, and what else of its power the next worker must know. */
export class PowerState implements PowerNotes {
  isOff = false;
  isOrderly = true;
  isMeasuring = false;
  bufferSize = 0;

  /** Takes over what a worker before this one knew. */
  restore(notes: PowerNotes): void {
    Object.assign(this, notes);
  }

  /**
   * Takes note of a command that ran. A TPM that was shut down says so in its permanent state until something changes that, and
   * then it stores it. So what only reads does not make another Shutdown necessary: a guest's Shutdown(STATE) stays valid.
   */
  ran(command: Buffer, response: Buffer, stored: boolean): void {
    const code = commandCode(command);
    const isDone = responseCode(response) === TPM_RC_SUCCESS;
    if (code === TPM_CC.Shutdown && isDone) this.isOrderly = true;
    else if (stored || (code === TPM_CC.Startup && isDone)) this.isOrderly = false;
  }
}
