import { ManagerError } from '../error.js';
import type { StateStore, StoreEntry } from './state-store.js';

/** Large enough that the pauses between pages do not count; the store process ends a page of large records earlier. */
const PAGE_RECORDS = 512;

/**
 * All records of a store, in order. The store process reads the next page while the last one is looked at; more than
 * these two are never in memory.
 * @throws ManagerError `store-corrupt` for records out of order: damaged files may lead in circles
 */
export async function* pagesOf(store: StateStore): AsyncGenerator<readonly StoreEntry[]> {
  let after: string | undefined;
  let next = store.list(undefined, PAGE_RECORDS);
  for (;;) {
    const page = await next;
    const last = page.at(-1);
    if (!last) return;
    for (const { key } of page) {
      if (after !== undefined && key <= after) {
        throw new ManagerError(
          'store-corrupt',
          'the store is damaged: its records are out of order; restore it from a backup',
        );
      }
      after = key;
    }
    next = store.list(last.key, PAGE_RECORDS);
    // Whoever stops here never looks at it.
    next.catch(() => undefined);
    yield page;
  }
}
