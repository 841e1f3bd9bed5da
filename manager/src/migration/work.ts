import { ManagerError } from '../error.js';

/** What is under way, until nothing more begins. */
export class Work {
  readonly #running = new Set<Promise<unknown>>();
  #isClosing = false;

  /** @throws ManagerError `shutting-down` */
  checkOpen(): void {
    if (this.#isClosing) throw new ManagerError('shutting-down', 'the manager is shutting down; try again');
  }

  /** Its end is waited for. */
  async of<T>(work: Promise<T>): Promise<T> {
    this.#running.add(work);
    try {
      return await work;
    } finally {
      this.#running.delete(work);
    }
  }

  /** Nothing begins any more. */
  close(): void {
    this.#isClosing = true;
  }

  /** Resolves when nothing is under way. */
  async over(): Promise<void> {
    await Promise.allSettled(this.#running);
  }
}
