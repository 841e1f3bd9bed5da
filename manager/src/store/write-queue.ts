import { ManagerError } from '../error.js';
import type { Counting } from './anchored-store.js';
import { MAX_BATCH_BYTES, MAX_BATCH_WRITES } from './limits.js';
import type { StoreWrite } from './state-store.js';

export interface QueuedWrite extends StoreWrite {
  readonly value: Uint8Array;
  readonly counting: Counting;
  resolve(version: number): void;
  reject(error: ManagerError): void;
}

/** Writes that wait for a commit, in the order in which they came. */
export class WriteQueue {
  #waiting: QueuedWrite[] = [];

  /** @param versionOf the version of a key that is committed, 0 where there is none */
  constructor(private readonly versionOf: (key: string) => number) {}

  get isEmpty(): boolean {
    return this.#waiting.length === 0;
  }

  /** Some need not be counted by the TPM before they are acknowledged. */
  get hasUncounted(): boolean {
    return this.#waiting.some(({ counting }) => counting === 'later');
  }

  push(write: QueuedWrite): void {
    this.#waiting.push(write);
  }

  /** All that wait, which are nobody's any more. */
  clear(): QueuedWrite[] {
    return this.#waiting.splice(0);
  }

  /**
   * The writes of the next commit. A stale one is refused here, alone: in the transaction it would fail all. A second
   * write of a key waits for the next commit, which decides whether it is stale. While the TPM counts, no anchor may
   * say more than that it is about to: writes that have to be counted wait.
   */
  take(mayCount: boolean): QueuedWrite[] {
    const batch: QueuedWrite[] = [];
    const waiting: QueuedWrite[] = [];
    const keys = new Set<string>();
    let bytes = 0;
    let isFull = false;
    for (const write of this.#waiting) {
      isFull ||=
        batch.length === MAX_BATCH_WRITES ||
        (batch.length > 0 && bytes + write.value.length > MAX_BATCH_BYTES);
      const mustWait = write.counting === 'now' && !mayCount;
      if (isFull || mustWait || keys.has(write.key)) {
        waiting.push(write);
        keys.add(write.key);
        continue;
      }
      const version = this.versionOf(write.key);
      if (write.expectedVersion !== version) {
        write.reject(
          new ManagerError('stale', `${write.key} has version ${version}, not ${write.expectedVersion}`),
        );
        continue;
      }
      keys.add(write.key);
      batch.push(write);
      bytes += write.value.length;
    }
    this.#waiting = waiting;
    return batch;
  }
}
