import { closeSync, readSync } from 'node:fs';
import { CHECKPOINT_LAYOUT as LAYOUT, pipePair, sharedMemory } from 'vtpm-common';

/**
 * What one VM run has beside its workers: the memory with their checkpoints and the pipe that answers go through. It is
 * nowhere on disk. The workers write the memory and are not trusted: what is read here are numbers, and they are only
 * compared.
 */
export class CheckpointStore {
  readonly #memory: number;
  readonly #pipe: { readonly read: number; readonly write: number };
  #newest = 0;

  /** @throws SystemCallError */
  constructor() {
    this.#memory = sharedMemory('vtpm-checkpoint', LAYOUT.bytes);
    try {
      this.#pipe = pipePair();
    } catch (error) {
      closeSync(this.#memory);
      throw error;
    }
  }

  /** What a worker gets, in this order: the memory, the end of the pipe to read from, the one to write to. */
  get descriptors(): readonly number[] {
    return [this.#memory, this.#pipe.read, this.#pipe.write];
  }

  /** Sequence of the newest checkpoint, 0 for none; never lower than before. Call it when no worker runs. */
  newest(): number {
    this.#newest = Math.max(this.#newest, ...LAYOUT.slots.map((offset) => this.#read(offset)));
    return this.#newest;
  }

  /** Rises with each answer that a worker gives. */
  answers(): number {
    return this.#read(LAYOUT.piped);
  }

  close(): void {
    for (const fd of this.descriptors) closeSync(fd);
  }

  #read(offset: number): number {
    const bytes = Buffer.alloc(8);
    readSync(this.#memory, bytes, 0, 8, offset);
    const value = bytes.readBigUInt64LE();
    return value <= BigInt(Number.MAX_SAFE_INTEGER) ? Number(value) : 0;
  }
}
