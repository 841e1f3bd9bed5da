import { closeSync, readSync } from 'node:fs';
import { CHECKPOINT_LAYOUT as LAYOUT, pipePair, sharedMemory } from 'vtpm-common';
import type { InheritedDescriptors, KeptDescriptors } from './handover/descriptors.js';
import type { RunHandOver } from './handover/state.js';

type StoreHandOver = Pick<RunHandOver, 'memory' | 'pipe' | 'newest'>;

/**
 * What one VM run has beside its workers: the memory with their checkpoints and the pipe that answers go through. It is
 * nowhere on disk. The workers write the memory and are not trusted: what is read here are numbers, and they are only
 * compared.
 */
export class CheckpointStore {
  readonly #memory: number;
  readonly #pipe: { readonly read: number; readonly write: number };
  #newest: number;

  /** @throws SystemCallError */
  constructor(before?: StoreHandOver) {
    this.#newest = before?.newest ?? 0;
    this.#memory = before?.memory ?? sharedMemory('vtpm-checkpoint', LAYOUT.bytes);
    try {
      this.#pipe = before?.pipe ?? pipePair();
    } catch (error) {
      closeSync(this.#memory);
      throw error;
    }
  }

  /** One of the program before this one. @throws ToolstackError `corrupt` */
  static adopt({ memory, pipe, newest }: StoreHandOver, inherited: InheritedDescriptors): CheckpointStore {
    inherited.take(memory);
    inherited.take(pipe.read);
    inherited.take(pipe.write);
    return new CheckpointStore({ memory, pipe, newest });
  }

  handOver(kept: KeptDescriptors): StoreHandOver {
    const { read, write } = this.#pipe;
    return {
      memory: kept.keep(this.#memory),
      pipe: { read: kept.keep(read), write: kept.keep(write) },
      newest: this.#newest,
    };
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
