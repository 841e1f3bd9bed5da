import { VtpmdError } from '../error.js';
import type { SaveSession } from '../manager-link/save-session.js';
import type { StateBlobs } from '../state-blob/state-blobs.js';
import type { CommandQueue } from './command-queue.js';
import type { PowerSwitch } from './power-switch.js';

export interface FreezeParts {
  readonly queue: Pick<CommandQueue, 'hold' | 'release' | 'whenIdle'>;
  readonly session: Pick<SaveSession, 'frozen'>;
  readonly power: Pick<PowerSwitch, 'perform' | 'isOn' | 'saveOff'>;
  readonly blobs: Pick<StateBlobs, 'leave' | 'stay'>;
  /** It must not go on. */
  failed(error: unknown): void;
}

/**
 * FREEZE and THAW of the manager. Where the TPM leaves, that is one step that lasts until THAW: commands wait at every door,
 * and so does everything that a VMM asks for. It ends with the link that it came over, because who wanted it may be gone: on
 * the next one the TPM goes on. A manager that let another one have the TPM meanwhile does not take the Save that this begins
 * with, and so nothing is answered.
 */
export class ManagerFreeze {
  readonly #parts: FreezeParts;
  /** Resolves when it is frozen; with false where it came to nothing. */
  #frozen: Promise<boolean> | undefined;
  #isLeaving = false;
  #over: () => void = () => {};

  constructor(parts: FreezeParts) {
    this.#parts = parts;
  }

  /** @param suspends the TPM leaves: its whole state is saved */
  freeze(suspends: boolean): void {
    this.#frozen ??= suspends ? this.#leave() : this.#hold();
    const frozen = this.#frozen;
    frozen.then(
      (isFrozen) => {
        if (isFrozen && this.#frozen === frozen) this.#parts.session.frozen();
      },
      (error: unknown) => this.#parts.failed(error),
    );
  }

  thaw(): void {
    this.#over();
  }

  /** Whether the TPM is frozen to leave, when that is known. */
  async isLeaving(): Promise<boolean> {
    return this.#isLeaving && (await this.#frozen) === true;
  }

  #hold(): Promise<boolean> {
    const { queue } = this.#parts;
    queue.hold(FREEZE);
    this.#over = () => {
      this.#end();
      queue.release(FREEZE);
    };
    return queue.whenIdle().then(() => true);
  }

  #leave(): Promise<boolean> {
    const { power, blobs } = this.#parts;
    this.#isLeaving = true;
    const isOver = new Promise<void>((resolve) => {
      this.#over = () => {
        this.#end();
        resolve();
      };
    });
    return new Promise((resolve, reject) => {
      const run = async (): Promise<undefined> => {
        await (power.isOn ? blobs.leave() : power.saveOff());
        resolve(true);
        await isOver;
        await blobs.stay();
        return undefined;
      };
      power.perform({ isPatient: true, run }).catch((error: unknown) => {
        this.#end();
        // The link is lost, and the next one ends the freeze anyway.
        if (VtpmdError.from(error).code === 'manager-away') resolve(false);
        else reject(error);
      });
    });
  }

  #end(): void {
    this.#frozen = undefined;
    this.#isLeaving = false;
    this.#over = () => {};
  }
}

const FREEZE = 'freeze';
