import { barrier } from 'vtpm-common';
import { bytesEqual } from 'vtpm-proto';
import { ManagerError } from '../error.js';
import { ANCHOR_KEY, openAnchor, sealAnchor } from './anchor.js';
import { isStoreKey, MAX_BATCH_BYTES, MAX_BATCH_WRITES } from './limits.js';
import {
  buildMerkleTree,
  type LeafChange,
  type MerkleTree,
  type StagedTree,
  valueDigest,
} from './merkle-tree.js';
import { checkWrite, type StateStore, type StoreEntry, type StoreWrite } from './state-store.js';

/**
 * The store as the manager sees it. A tree in memory says what every record is; whatever the StateStore returns is
 * compared with it, and the tree's root is written, authenticated, in the transaction of each commit.
 *
 * Writes share commits: one is under way at a time, and what arrives meanwhile goes together into the next.
 */
export interface AnchoredStore {
  /** @throws ManagerError `store-corrupt` where the disk does not hold what was last written */
  read(key: string): Promise<StoreEntry | undefined>;
  /**
   * Durable and anchored when it resolves. `value` must not change before that.
   * @param expectedVersion of the record that this replaces, 0 for a new one
   * @returns the new version
   * @throws ManagerError `stale` (this write alone), `store-full` (nothing was written; later writes may work),
   * `too-large`, `bad-request`; anything else ends the store: it refuses whatever follows with the same error
   */
  write(key: string, expectedVersion: number, value: Uint8Array): Promise<number>;
  /** Up to `limit` keys greater than `after`, ascending, from memory. */
  keys(after: string | undefined, limit: number): string[];
  /** Count of records. */
  readonly size: number;
  /**
   * What the disk may hold, as the roots of 32 bytes that an anchor can have: that of the newest commit, and that of one
   * of which it is not known whether it happened. Whoever opens the store again after it was lost hands them over.
   */
  readonly roots: readonly Buffer[];
  /** Writes what was asked for, then closes the StateStore. */
  close(): Promise<void>;
}

export interface AnchorOptions {
  /** 16 bytes. */
  readonly storeId: Uint8Array;
  /** 32 bytes; copied. */
  readonly anchorKey: Uint8Array;
}

/** Anchors a store that has just been made. @throws ManagerError `already-initialised` where it is not empty */
export async function createAnchoredStore(store: StateStore, options: AnchorOptions): Promise<AnchoredStore> {
  const tree = buildMerkleTree([]);
  const anchor = sealAnchor(options.anchorKey, options.storeId, tree.root);
  const isFirst =
    (await store.list(undefined, 1)).length === 0 &&
    (await store.commit([{ key: ANCHOR_KEY, expectedVersion: 0, value: anchor }]));
  if (!isFirst)
    throw new ManagerError('already-initialised', 'the store is not empty; it is not anchored again');
  return new GroupCommitStore(store, tree, 1, options);
}

/**
 * Reads the whole store and compares it with its anchor.
 * @param roots of the same store before it was lost; absent at the start of the manager. An anchor proves that a store
 * was whole once, not that it is the newest
 * @param onBroken called once when the store has come to refuse everything
 * @throws ManagerError `store-missing` (empty), `store-corrupt`, `rollback-detected`, `newer-format`
 */
export async function openAnchoredStore(
  store: StateStore,
  options: AnchorOptions,
  roots?: readonly Uint8Array[],
  onBroken?: (error: ManagerError) => void,
): Promise<AnchoredStore> {
  const { leaves, anchor } = await readAll(store);
  if (!anchor) {
    if (leaves.length > 0) throw corrupt('its anchor was removed');
    throw new ManagerError(
      'store-missing',
      'the store is empty: its set-up did not finish, or it was emptied',
    );
  }
  const { root } = openAnchor(options.anchorKey, options.storeId, anchor.value);
  const tree = buildMerkleTree(leaves);
  if (!bytesEqual(tree.root, root)) {
    throw new ManagerError(
      'rollback-detected',
      'the store is not what was last written: a record was put back, replaced, removed or added behind the manager',
    );
  }
  if (roots && !roots.some((newest) => bytesEqual(newest, root))) {
    throw new ManagerError(
      'rollback-detected',
      'the store was put back to an older state while the manager was running; restore the newest one',
    );
  }
  return new GroupCommitStore(store, tree, anchor.version, options, onBroken);
}

const PAGE_RECORDS = 512;

async function readAll(store: StateStore): Promise<{ leaves: LeafChange[]; anchor: StoreEntry | undefined }> {
  const leaves: LeafChange[] = [];
  let anchor: StoreEntry | undefined;
  for (let after: string | undefined; ; ) {
    const page = await store.list(after, PAGE_RECORDS);
    if (page.length === 0) return { leaves, anchor };
    for (const entry of page) {
      const { key, version, value } = entry;
      // Damaged pages may lead in circles.
      if (after !== undefined && key <= after) throw corrupt('its records are out of order');
      after = key;
      if (key === ANCHOR_KEY) anchor = entry;
      else leaves.push({ key, version, digest: valueDigest(value) });
    }
  }
}

function corrupt(what: string): ManagerError {
  return new ManagerError('store-corrupt', `the store is damaged: ${what}; restore it from a backup`);
}

interface QueuedWrite extends StoreWrite {
  readonly value: Uint8Array;
  resolve(version: number): void;
  reject(error: ManagerError): void;
}

class GroupCommitStore implements AnchoredStore {
  readonly #anchorKey: Buffer;
  #queue: QueuedWrite[] = [];
  /** The commit under way. It never rejects. */
  #committing: Promise<void> | undefined;
  #committingKeys: ReadonlySet<string> = new Set();
  #isScheduled = false;
  /** The root of a commit of which it is not known whether it is on the disk. */
  #uncertain: Buffer | undefined;
  /** Why the store refuses everything. */
  #broken: ManagerError | undefined;
  #closing: Promise<void> | undefined;

  constructor(
    private readonly store: StateStore,
    private readonly tree: MerkleTree,
    private anchorVersion: number,
    private readonly options: AnchorOptions,
    private readonly onBroken: (error: ManagerError) => void = () => undefined,
  ) {
    // Not from the shared pool: it is wiped.
    this.#anchorKey = Buffer.alloc(options.anchorKey.length);
    this.#anchorKey.set(options.anchorKey);
  }

  get size(): number {
    return this.tree.size;
  }

  get roots(): readonly Buffer[] {
    return this.#uncertain ? [this.tree.root, this.#uncertain] : [this.tree.root];
  }

  keys(after: string | undefined, limit: number): string[] {
    return this.tree.keys(after, limit);
  }

  async read(key: string): Promise<StoreEntry | undefined> {
    checkKey(key);
    for (;;) {
      this.#refuseIfEnded();
      const before = this.#fingerprint(key);
      const entry = await this.store.get(key);
      const read = fingerprintOf(entry);
      if (read === before || read === this.#fingerprint(key)) return entry;
      // A commit may have been overtaken: its content is on disk, and not yet in the tree.
      const isMoving = this.#committingKeys.has(key) || before !== this.#fingerprint(key);
      if (!isMoving) throw this.#break(corrupt(`${key} is not what was last written`));
      await this.#committing;
    }
  }

  write(key: string, expectedVersion: number, value: Uint8Array): Promise<number> {
    return new Promise((resolve, reject) => {
      checkKey(key);
      this.#refuseIfEnded();
      checkWrite({ key, expectedVersion, value });
      this.#queue.push({ key, expectedVersion, value, resolve, reject });
      this.#schedule();
    });
  }

  close(): Promise<void> {
    this.#closing ??= this.#end();
    return this.#closing;
  }

  async #end(): Promise<void> {
    while (this.#committing || this.#queue.length > 0) {
      await (this.#committing ?? this.#commitNext());
    }
    this.#anchorKey.fill(0);
    await this.store.close();
  }

  /** Not at once: writes of the same turn of the event loop share the first commit too. */
  #schedule(): void {
    if (this.#isScheduled || this.#committing) return;
    this.#isScheduled = true;
    queueMicrotask(() => {
      this.#isScheduled = false;
      void this.#commitNext();
    });
  }

  #commitNext(): Promise<void> {
    if (this.#committing) return this.#committing;
    const batch = this.#takeBatch();
    if (batch.length === 0) return Promise.resolve();
    this.#committingKeys = new Set(batch.map((write) => write.key));
    this.#committing = this.#commit(batch).finally(() => {
      this.#committing = undefined;
      this.#committingKeys = new Set();
      if (this.#queue.length > 0) this.#schedule();
    });
    return this.#committing;
  }

  /**
   * The writes of the next commit. A stale one is refused here, alone: in the transaction it would fail all. A second
   * write of a key waits for the next commit, which decides whether it is stale.
   */
  #takeBatch(): QueuedWrite[] {
    const batch: QueuedWrite[] = [];
    const waiting: QueuedWrite[] = [];
    const keys = new Set<string>();
    let bytes = 0;
    let isFull = false;
    for (const write of this.#queue) {
      isFull ||=
        batch.length === MAX_BATCH_WRITES ||
        (batch.length > 0 && bytes + write.value.length > MAX_BATCH_BYTES);
      if (isFull || keys.has(write.key)) {
        waiting.push(write);
        continue;
      }
      const version = this.tree.get(write.key)?.version ?? 0;
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
    this.#queue = waiting;
    return batch;
  }

  async #commit(batch: readonly QueuedWrite[]): Promise<void> {
    try {
      const staged = await this.#commitStaged(batch);
      staged.apply();
      this.#uncertain = undefined;
      this.anchorVersion++;
    } catch (cause) {
      const error = ManagerError.from(cause, 'the store cannot be written');
      // Of anything but a full disk it is not known whether it is on the disk.
      if (error.code === 'store-full') this.#uncertain = undefined;
      else this.#break(error);
      for (const write of batch) write.reject(error);
      return;
    }
    for (const write of batch) write.resolve(write.expectedVersion + 1);
  }

  async #commitStaged(batch: readonly QueuedWrite[]): Promise<StagedTree> {
    const staged = this.tree.stage(
      batch.map(({ key, expectedVersion, value }) => ({
        key,
        version: expectedVersion + 1,
        digest: valueDigest(value),
      })),
    );
    const anchor = sealAnchor(this.#anchorKey, this.options.storeId, staged.root);
    this.#uncertain = staged.root;
    barrier('store.commit');
    const isCommitted = await this.store.commit([
      ...batch.map(({ key, expectedVersion, value }) => ({ key, expectedVersion, value })),
      { key: ANCHOR_KEY, expectedVersion: this.anchorVersion, value: anchor },
    ]);
    barrier('store.committed');
    if (!isCommitted) throw corrupt('it was changed while the manager was running');
    return staged;
  }

  #break(error: ManagerError): ManagerError {
    const isFirst = !this.#broken;
    this.#broken ??= error;
    for (const write of this.#queue.splice(0)) write.reject(error);
    if (isFirst) this.onBroken(error);
    return error;
  }

  #refuseIfEnded(): void {
    if (this.#broken) throw this.#broken;
    if (this.#closing) throw new ManagerError('shutting-down', 'the store is being closed');
  }

  #fingerprint(key: string): string {
    const leaf = this.tree.get(key);
    return leaf ? fingerprint(leaf.version, leaf.digest) : '';
  }
}

function fingerprintOf(entry: StoreEntry | undefined): string {
  return entry ? fingerprint(entry.version, valueDigest(entry.value)) : '';
}

/** Version and content in one comparable value; '' is no record. */
function fingerprint(version: number, digest: Uint8Array): string {
  return `${version} ${Buffer.from(digest.buffer, digest.byteOffset, digest.length).toString('latin1')}`;
}

function checkKey(key: string): void {
  if (!isStoreKey(key) || key === ANCHOR_KEY) {
    throw new ManagerError('bad-request', 'this is no key of a record');
  }
}
