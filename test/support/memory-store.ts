import { ManagerError } from 'vtpm-manager';
import type { StateStore, StoreEntry, StoreWrite } from 'vtpm-manager/store/state-store';

/** A StateStore in memory: what a test puts under AnchoredStore where the disk is not what it tests. */
export class MemoryStore implements StateStore {
  readonly #entries: Map<string, StoreEntry>;
  /** Called before each commit; what it throws fails the commit, what it returns is waited for. */
  beforeCommit: (writes: readonly StoreWrite[]) => void | Promise<void> = () => undefined;
  commits = 0;

  constructor(entries: readonly StoreEntry[] = []) {
    this.#entries = new Map(entries.map((entry) => [entry.key, entry]));
  }

  async get(key: string): Promise<StoreEntry | undefined> {
    return this.#entries.get(key);
  }

  async commit(writes: readonly StoreWrite[]): Promise<boolean> {
    await this.beforeCommit(writes);
    if (
      writes.some(({ key, expectedVersion }) => (this.#entries.get(key)?.version ?? 0) !== expectedVersion)
    ) {
      return false;
    }
    for (const { key, expectedVersion, value } of writes) {
      if (value === null) this.#entries.delete(key);
      else this.#entries.set(key, { key, version: expectedVersion + 1, value: Buffer.from(value) });
    }
    this.commits += 1;
    return true;
  }

  async list(after: string | undefined, limit: number): Promise<StoreEntry[]> {
    return [...this.#entries.values()]
      .filter(({ key }) => after === undefined || key > after)
      .sort((a, b) => (a.key < b.key ? -1 : 1))
      .slice(0, limit);
  }

  async close(): Promise<void> {}
}

export function storeFull(): never {
  throw new ManagerError('store-full', 'the disk is full');
}
