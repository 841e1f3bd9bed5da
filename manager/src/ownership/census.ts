import { isTombstone } from '../records/index.js';
import type { StoreEntry } from '../store/index.js';

export const VTPM_PREFIX = 'vtpm/';

/** How many vTPMs there are, counted once when the store is read and then kept up: nobody lists them to know. */
export class Census {
  #live = 0;
  #retired = 0;

  get live(): number {
    return this.#live;
  }

  get retired(): number {
    return this.#retired;
  }

  /** A record of the store, of a vTPM or not, while it is opened. */
  take({ key, value }: Pick<StoreEntry, 'key' | 'value'>): void {
    if (!key.startsWith(VTPM_PREFIX)) return;
    if (isTombstone(value)) this.#retired += 1;
    else this.#live += 1;
  }

  noteNew(): void {
    this.#live += 1;
  }

  noteRetired(): void {
    this.#live -= 1;
    this.#retired += 1;
  }
}
