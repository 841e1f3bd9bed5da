import type { Settings } from 'vtpm-common';

export type PoolSettings = Pick<Settings, 'pool-min' | 'pool-max' | 'pool-memory-reserve'>;

/** Starts of this time are expected to come again. */
const RECENT_MS = 60_000;
/** To find out what is available several files of the kernel are read; a worker takes longer to come up. */
const MEMORY_MS = 100;
/** What a worker that waits costs at most. */
const WORKER_MIB = 16;
const MIB = 2 ** 20;

/** How many workers shall wait: by the starts of late, within the settings and the host's memory. */
export class PoolSize {
  readonly #settings: PoolSettings;
  #recent: number[] = [];
  #memory = { mib: 0, at: Number.NEGATIVE_INFINITY };

  constructor(settings: PoolSettings) {
    this.#settings = settings;
  }

  noteStart(): void {
    this.#recent.push(performance.now());
  }

  /** @param waiting how many there are */
  target(waiting: number): number {
    const { 'pool-min': least, 'pool-max': most, 'pool-memory-reserve': reserve } = this.#settings;
    const since = performance.now() - RECENT_MS;
    this.#recent = this.#recent.filter((at) => at >= since);
    const wanted = Math.min(most, Math.max(least, this.#recent.length));
    const room = Math.floor((this.#availableMib() - reserve) / WORKER_MIB);
    return Math.max(0, Math.min(wanted, waiting + room));
  }

  #availableMib(): number {
    const now = performance.now();
    if (now - this.#memory.at >= MEMORY_MS) this.#memory = { mib: process.availableMemory() / MIB, at: now };
    return this.#memory.mib;
  }
}
