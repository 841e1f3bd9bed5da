import { closeSync, fstatSync } from 'node:fs';
import { setCloseOnExec } from 'vtpm-common/exec';
import { ToolstackError } from '../../error.js';

/** Collects the descriptors that the next program keeps. */
export class KeptDescriptors {
  readonly #kept = new Set<number>();

  /** @returns the descriptor, which is the same one for the next program */
  keep(fd: number): number {
    if (this.#kept.has(fd)) throw new ToolstackError('internal', `descriptor ${fd} is handed over twice`);
    this.#kept.add(fd);
    return fd;
  }

  get all(): readonly number[] {
    return [...this.#kept];
  }
}

/**
 * The descriptors that the program before kept for this one. Each is taken once; what nobody takes is closed. None of
 * them goes on to the processes that this one starts.
 */
export class InheritedDescriptors {
  readonly #waiting: Set<number>;

  /** @throws ToolstackError `corrupt` where one of them is not open */
  constructor(descriptors: readonly number[]) {
    this.#waiting = new Set(descriptors);
    for (const fd of this.#waiting) {
      try {
        fstatSync(fd);
      } catch {
        throw new ToolstackError('corrupt', `the hand-over names descriptor ${fd}, which is not open`);
      }
    }
    for (const fd of this.#waiting) setCloseOnExec(fd, true);
  }

  /** @throws ToolstackError `corrupt` */
  take(fd: number): number {
    if (this.#waiting.delete(fd)) return fd;
    throw new ToolstackError(
      'corrupt',
      `the hand-over uses descriptor ${fd}, which it does not name or uses twice`,
    );
  }

  /** @throws ToolstackError `corrupt` also where it is no socket */
  takeSocket(fd: number): number {
    if (fstatSync(this.take(fd)).isSocket()) return fd;
    closeSync(fd);
    throw new ToolstackError('corrupt', `the hand-over uses descriptor ${fd} as a socket, which it is not`);
  }

  closeRest(): void {
    for (const fd of this.#waiting) closeSync(fd);
    this.#waiting.clear();
  }
}
