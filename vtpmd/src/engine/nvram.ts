import type { EngineState } from './engine.js';
import {
  allocate,
  type Callbacks,
  TPM_FAIL,
  TPM_RETRY,
  TPM_SUCCESS,
  viewOf,
  writePointer,
  writeU32,
} from './libtpms.js';

/** Answers libtpms's storage calls from memory: what is durable is decided above, before a response leaves. */
export class Nvram implements Callbacks {
  #permanent: Buffer | undefined;
  #volatile: Buffer | undefined;
  #isNew = false;
  #stored: Buffer | undefined;

  begin(state: EngineState): void {
    this.#permanent = state.permanent ? Buffer.from(state.permanent) : undefined;
    this.#volatile = state.volatile ? Buffer.from(state.volatile) : undefined;
    this.#isNew = state.manufacture;
    this.#stored = undefined;
  }

  /** The TPM is on: libtpms has read what it needs. */
  end(): void {
    this.#permanent?.fill(0);
    this.#volatile?.fill(0);
    this.#permanent = this.#volatile = undefined;
    this.#isNew = false;
  }

  takeStored(): Buffer | undefined {
    const stored = this.#stored;
    this.#stored = undefined;
    return stored;
  }

  load(data: bigint, length: bigint, name: string): number {
    // While it makes a TPM, libtpms stores "permall" and loads it again: it must get what it has just stored.
    const content =
      name === 'permall'
        ? (this.#stored ?? this.#permanent)
        : name === 'volatilestate'
          ? this.#volatile
          : undefined;
    if (!content) {
      // TPM_RETRY means "there is none", and for permall it makes libtpms manufacture a new TPM.
      return name === 'permall' && !this.#isNew ? TPM_FAIL : TPM_RETRY;
    }
    const copy = allocate(content.length);
    viewOf(copy, content.length).set(content);
    writePointer(data, copy);
    writeU32(length, content.length);
    return TPM_SUCCESS;
  }

  store(data: bigint, length: number, name: string): number {
    if (name !== 'permall') return TPM_FAIL;
    this.#stored = Buffer.from(viewOf(data, length));
    return TPM_SUCCESS;
  }

  remove(name: string): number {
    if (name === 'volatilestate') this.#volatile = undefined;
    return TPM_SUCCESS;
  }
}
