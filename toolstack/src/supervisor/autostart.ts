import { setTimeout as delay } from 'node:timers/promises';
import type { AdminClient } from './admin-client.js';
import { inParallel } from './in-parallel.js';
import type { Vtpm } from './vtpm.js';

/** Starting costs processor time: more side by side would only share it. */
const PARALLEL_STARTS = 4;
const RETRY_MS = 500;

/** Starts the vTPMs that start by themselves, each once. */
export class Autostart {
  readonly #admin: AdminClient;
  readonly #closing: AbortSignal;
  /** Those that are still to be started. */
  readonly #toStart: Set<Vtpm>;
  #underWay: Promise<void>;
  #isHeld = false;

  /** @param closing nothing is started any more */
  constructor(admin: AdminClient, toStart: readonly Vtpm[], closing: AbortSignal) {
    this.#admin = admin;
    this.#toStart = new Set(toStart);
    this.#closing = closing;
    this.#underWay = this.#startAll();
  }

  /** No further start begins until `release`. */
  hold(): void {
    this.#isHeld = true;
  }

  release(): void {
    this.#isHeld = false;
    this.#underWay = this.#underWay.then(() => this.#startAll());
  }

  forget(vtpm: Vtpm): void {
    this.#toStart.delete(vtpm);
  }

  /** Of those that are still to be started. */
  get ids(): string[] {
    return [...this.#toStart].map(({ entry }) => entry.id);
  }

  /** When nothing is being started. */
  get settled(): Promise<void> {
    return this.#underWay;
  }

  /** Waits for the manager first: at boot it may come later. */
  async #startAll(): Promise<void> {
    const signal = this.#closing;
    const isOver = (): boolean => signal.aborted || this.#isHeld;
    while (this.#toStart.size > 0 && !isOver()) {
      const health = await this.#admin.health().catch(() => undefined);
      if (health?.status === 'ready') break;
      await delay(RETRY_MS, undefined, { signal }).catch(() => undefined);
    }
    await inParallel(PARALLEL_STARTS, [...this.#toStart], async (vtpm) => {
      if (isOver()) return;
      this.#toStart.delete(vtpm);
      if (vtpm.state !== 'stopped') return;
      // The reason is in the log and in the vTPM's view.
      await vtpm.start().catch(() => undefined);
    });
  }
}
