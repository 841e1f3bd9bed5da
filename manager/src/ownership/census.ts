import type { RecordHeader } from 'vtpm-proto';
import { isTombstone, vtpmOfKey } from '../records/index.js';
import type { StoreEntry } from '../store/index.js';

type RecordKind = RecordHeader['kind'];

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
    if (vtpmOfKey(key) === undefined) return;
    this.#add(isTombstone(value) ? 'RETIRED' : 'LIVE', 1);
  }

  /** A record was written. @param before undefined where there was none */
  note(before: RecordKind | undefined, after: RecordKind): void {
    if (before === after) return;
    if (before !== undefined) this.#add(before, -1);
    this.#add(after, 1);
  }

  #add(kind: RecordKind, count: number): void {
    if (kind === 'RETIRED') this.#retired += count;
    else this.#live += count;
  }
}
