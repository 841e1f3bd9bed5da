import { randomBytes } from 'node:crypto';
import { responseCode, stirRandom, TPM_RC_INITIALIZE, TPM_RC_SUCCESS } from '../engine/command.js';
import { discard, type TpmEngine } from '../engine/engine.js';
import { VtpmdError } from '../error.js';

/** A command's run that can be undone. Exactly one of `keep` and `undo` ends it. */
export interface Trial {
  /** Permanent state that was stored before the command itself ran. */
  readonly stored: Buffer | undefined;
  keep(): void;
  /** The TPM is again what it was before. @throws VtpmdError `engine`; there is no TPM then */
  undo(): void;
}

/**
 * Makes trials. After an undo the TPM's random generator stands where it stood before, so the next trial, or `stir` with
 * the next command that is not tried, stirs it first: no two answers ever come from the same generator state.
 */
export class Trials {
  readonly #engine: TpmEngine;
  #mustStir = false;

  constructor(engine: TpmEngine) {
    this.#engine = engine;
  }

  get mustStir(): boolean {
    return this.#mustStir;
  }

  /** The generator was stirred by a command that stays. */
  stirred(): void {
    this.#mustStir = false;
  }

  begin(): Trial {
    const snapshot = this.#engine.snapshot();
    let stored: Buffer | undefined;
    if (this.#mustStir) {
      const processed = this.#engine.process(freshStir());
      expectStirred(processed.response);
      // It may store itself: any command may, where the TPM takes back a count of wrong authorisations.
      stored = processed.stored;
    }
    return {
      stored,
      keep: () => {
        this.#mustStir = false;
        discard(snapshot);
      },
      undo: () => {
        this.#engine.restore(snapshot);
        this.#mustStir = true;
        discard(snapshot);
      },
    };
  }
}

export function freshStir(): Buffer {
  return stirRandom(randomBytes(STIR_BYTES));
}

/** @throws VtpmdError `engine` */
export function expectStirred(response: Buffer): void {
  const code = responseCode(response);
  // Before Startup there is nothing to stir, and nothing random is given out.
  if (code === TPM_RC_SUCCESS || code === TPM_RC_INITIALIZE) return;
  throw new VtpmdError('engine', `the TPM answered StirRandom with 0x${code.toString(16)}`);
}

const STIR_BYTES = 32;
