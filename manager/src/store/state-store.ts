import { ManagerError } from '../error.js';
import { isStoreKey, MAX_VALUE_BYTES } from './limits.js';

/**
 * A key-value store with versions. It holds no key and checks no content: what it returns is believed only after
 * AnchoredStore has compared it with its tree.
 */
export interface StateStore {
  get(key: string): Promise<StoreEntry | undefined>;
  /**
   * All writes in one transaction, durable when the promise resolves. A written record has version
   * `expectedVersion + 1`.
   * @returns false where some version was not the expected one; nothing was written then
   * @throws ManagerError `store-full`: nothing was written, later commits may work. After any other error it is not
   * known whether this commit is in the store: open it again.
   */
  commit(writes: readonly StoreWrite[]): Promise<boolean>;
  /**
   * Records whose key is greater than `after`, in ascending order of their ASCII keys. At most `limit`, fewer where
   * they are large; none at the end only.
   */
  list(after: string | undefined, limit: number): Promise<StoreEntry[]>;
  /** Answers what is under way, then ends. */
  close(): Promise<void>;
}

export interface StoreEntry {
  readonly key: string;
  /** 1 for a record's first content. */
  readonly version: number;
  readonly value: Buffer;
}

export interface StoreWrite {
  readonly key: string;
  /** 0: the record must be absent. */
  readonly expectedVersion: number;
  /** null removes the record. */
  readonly value: Uint8Array | null;
}

/** @throws ManagerError `bad-request` or `too-large` */
export function checkWrite(write: StoreWrite): void {
  if (!isStoreKey(write.key)) {
    throw new ManagerError(
      'bad-request',
      'a store key is 1 to 128 printable ASCII characters without spaces',
    );
  }
  if (!Number.isSafeInteger(write.expectedVersion) || write.expectedVersion < 0) {
    throw new ManagerError('bad-request', `${write.key}: a version is a whole number from 0`);
  }
  if (write.value !== null && write.value.length > MAX_VALUE_BYTES) {
    throw new ManagerError(
      'too-large',
      `${write.key}: the record has ${write.value.length} bytes, the store takes ${MAX_VALUE_BYTES}`,
    );
  }
}
