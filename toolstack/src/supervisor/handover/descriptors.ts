import { closeSync, fstatSync, statSync } from 'node:fs';
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

  /** Those that are not open are missed by whoever takes them. */
  constructor(descriptors: readonly number[]) {
    this.#waiting = new Set(descriptors.filter(isOpen));
    for (const fd of this.#waiting) setCloseOnExec(fd, true);
  }

  /** @throws ToolstackError `corrupt` */
  take(fd: number): number {
    if (this.#waiting.delete(fd)) return fd;
    throw new ToolstackError(
      'corrupt',
      `the hand-over uses descriptor ${fd}, which is not open, not named in it or used twice`,
    );
  }

  /** One that is the file at `path`. @throws ToolstackError `corrupt` */
  takeFile(fd: number, path: string): number {
    const there = statSync(path, { bigint: true, throwIfNoEntry: false });
    const { dev, ino } = fstatSync(this.take(fd), { bigint: true });
    if (there?.dev === dev && there.ino === ino) return fd;
    throw new ToolstackError('corrupt', `descriptor ${fd} of the hand-over does not hold the lock ${path}`);
  }

  /** @throws ToolstackError `corrupt` also where it is no socket */
  takeSocket(fd: number): number {
    if (fstatSync(this.take(fd)).isSocket()) return fd;
    throw new ToolstackError('corrupt', `the hand-over uses descriptor ${fd} as a socket, which it is not`);
  }

  closeRest(): void {
    for (const fd of this.#waiting) closeSync(fd);
    this.#waiting.clear();
  }
}

function isOpen(fd: number): boolean {
  try {
    fstatSync(fd);
    return true;
  } catch {
    return false;
  }
}
