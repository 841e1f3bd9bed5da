import { closeSync, readSync } from 'node:fs';
import { CHECKPOINT_LAYOUT as LAYOUT, pipePair, setPipeRoom, sharedMemory } from 'vtpm-common';
import type { InheritedDescriptors, KeptDescriptors } from './handover/descriptors.js';
import type { RunHandOver } from './handover/state.js';

type StoreHandOver = Pick<RunHandOver, 'memory' | 'pipe' | 'controlPipe' | 'newest'>;
type Pipe = { readonly read: number; readonly write: number };

/** The largest answer to a control request is a blob with the state of a full TPM. */
const CONTROL_PIPE_BYTES = 256 * 1024;

/**
 * What one VM run has beside its workers: the memory with their checkpoints and the pipe that answers go through. It is
 * nowhere on disk. The workers write the memory and are not trusted: what is read here are numbers, and they are only
 * compared.
 */
export class CheckpointStore {
  readonly #memory: number;
  readonly #pipe: Pipe;
  readonly #controlPipe: Pipe | undefined;
  #newest: number;

  /** @throws SystemCallError */
  static create({ control }: { readonly control: boolean }): CheckpointStore {
    const opened: number[] = [];
    const keep = (pipe: Pipe): Pipe => {
      opened.push(pipe.read, pipe.write);
      return pipe;
    };
    try {
      const memory = sharedMemory('vtpm-checkpoint', LAYOUT.bytes);
      opened.push(memory);
      const pipe = keep(pipePair());
      const controlPipe = control ? keep(pipePair()) : null;
      // With less, a state that does not fit is refused when it is asked for.
      if (controlPipe) setPipeRoom(controlPipe.write, CONTROL_PIPE_BYTES);
      return new CheckpointStore({ memory, pipe, controlPipe, newest: 0 });
    } catch (error) {
      for (const fd of opened) closeSync(fd);
      throw error;
    }
  }

  private constructor({ memory, pipe, controlPipe, newest }: StoreHandOver) {
    this.#memory = memory;
    this.#pipe = pipe;
    this.#controlPipe = controlPipe ?? undefined;
    this.#newest = newest;
  }

  /** One of the program before this one. @throws ToolstackError `corrupt` */
  static adopt(before: StoreHandOver, inherited: InheritedDescriptors): CheckpointStore {
    const store = new CheckpointStore(before);
    for (const fd of store.descriptors) inherited.take(fd);
    return store;
  }

  handOver(kept: KeptDescriptors): StoreHandOver {
    const keep = ({ read, write }: Pipe): Pipe => ({ read: kept.keep(read), write: kept.keep(write) });
    return {
      memory: kept.keep(this.#memory),
      pipe: keep(this.#pipe),
      controlPipe: this.#controlPipe ? keep(this.#controlPipe) : null,
      newest: this.#newest,
    };
  }

  /** For answers to control requests there is a pipe too. */
  get hasControl(): boolean {
    return this.#controlPipe !== undefined;
  }

  /** What a worker gets, in this order: the memory, then of each pipe the end to read from and the one to write to. */
  get descriptors(): readonly number[] {
    const pipes = this.#controlPipe ? [this.#pipe, this.#controlPipe] : [this.#pipe];
    return [this.#memory, ...pipes.flatMap(({ read, write }) => [read, write])];
  }

  /** Sequence of the newest checkpoint, 0 for none; never lower than before. Call it when no worker runs. */
  newest(): number {
    this.#newest = Math.max(this.#newest, ...LAYOUT.slots.map((offset) => this.#read(offset)));
    return this.#newest;
  }

  /** Rises with each answer that a worker gives. */
  answers(): number {
    // Both are numbers of one row, which rises over the whole VM run.
    return Math.max(this.#read(LAYOUT.piped), this.#read(LAYOUT.control.piped));
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
