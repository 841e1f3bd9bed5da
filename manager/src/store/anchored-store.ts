import type { Logger } from 'vtpm-common';
import { bytesEqual } from 'vtpm-proto';
import type { AuditHead } from '../audit/index.js';
import { ManagerError } from '../error.js';
import type { KeyHierarchy } from '../keys/index.js';
import type { AnchorCounter } from '../root-tpm/index.js';
import { ANCHOR_KEY, type AnchorFacts, openAnchor, sealAnchor } from './anchor.js';
import { reconcile } from './anchor-counter.js';
import { GroupCommitStore } from './group-commit.js';
import { buildMerkleTree, type LeafChange, valueDigest } from './merkle-tree.js';
import { pagesOf } from './pages.js';
import type { StateStore, StoreEntry } from './state-store.js';

/**
 * The store as the manager sees it. A tree in memory says what every record is; whatever the StateStore returns is
 * compared with it, and the tree's root is written, authenticated, in the transaction of each commit. The TPM counts
 * these statements, each one that matters and the others by and by, so that an old disk is known for one.
 *
 * Writes share commits: one is under way at a time, and what arrives meanwhile goes together into the next.
 */
export interface AnchoredStore {
  /** @throws ManagerError `store-corrupt` where the disk does not hold what was last written */
  read(key: string): Promise<StoreEntry | undefined>;
  /** Of a record, as it was last written; 0 where there is none. From memory. */
  version(key: string): number;
  /**
   * Durable and anchored when it resolves. `value` must not change before that.
   * @param expectedVersion of the record that this replaces, 0 for a new one
   * @param counting `now` resolves after the TPM has counted it: no older disk is taken any more. `later` leaves that to
   * the next step, at most the window away
   * @returns the new version
   * @throws ManagerError `stale` (this write alone), `store-full` (nothing was written; later writes may work),
   * `too-large`, `bad-request`; anything else ends the store: it refuses whatever follows with the same error
   */
  write(key: string, expectedVersion: number, value: Uint8Array, counting?: Counting): Promise<number>;
  /** Something that the anchor speaks of has changed without a write: the TPM counts it within the window. */
  noteChange(): void;
  /** Has the TPM count what was written so far, and the audit chain with it. */
  count(): Promise<void>;
  /** The audit chain as the anchor said it when the store was opened. */
  readonly auditAtOpen: AuditHead;
  /** The TPM lost power with an orderly counter: said at each start until an anchor is written after this one. */
  readonly isUnclean: boolean;
  /** Up to `limit` keys greater than `after`, ascending, from memory. */
  keys(after: string | undefined, limit: number): string[];
  /** Count of records. */
  readonly size: number;
  /** Bytes of the tree's tables. */
  readonly treeBytes: number;
  /** How far the TPM is behind. */
  readonly anchoring: AnchorState;
  /**
   * What the disk may hold, as the roots of 32 bytes that an anchor can have: that of the newest commit, and that of one
   * of which it is not known whether it happened. Whoever opens the store again after it was lost hands them over.
   */
  readonly roots: readonly Buffer[];
  /** What the anchor says after the newest commit. */
  readonly stated: Pick<AnchorFacts, 'root' | 'counter'>;
  /**
   * Before a close that must come to its end: a TPM that does not answer is not asked again, and who waits for it gets its
   * error. What is on the disk then is counted by the next start.
   */
  stopWaiting(): void;
  /** Writes what was asked for, has the TPM count it and the audit chain as it is, then closes the StateStore. */
  close(): Promise<void>;
}

/** How far the TPM is behind the store. Times are Unix milliseconds. */
export interface AnchorState {
  /** Of the oldest write that the TPM has not counted. */
  readonly pendingSince: number | undefined;
  /** The counter cannot be advanced, which is tried again. */
  readonly stalled: { readonly since: number; readonly reason: ManagerError } | undefined;
}

/** When the TPM counts a write. */
export type Counting = 'now' | 'later';

export interface AnchorOptions {
  /** Not owned. */
  readonly keys: KeyHierarchy;
  readonly counter: AnchorCounter;
  /** Milliseconds until the TPM counts a write that nobody waits for. */
  readonly windowMs: number;
  readonly log: Logger;
  /** The audit chain as it is now. */
  auditHead(): AuditHead;
  /** Gets every record while the store is opened, before it is known to be the newest one. */
  onEntry?(entry: StoreEntry): void;
  /** Called once when the store has come to refuse everything. */
  onBroken?(error: ManagerError): void;
}

/** Anchors a store that has just been made. @throws ManagerError `already-initialised` where it is not empty */
export async function createAnchoredStore(store: StateStore, options: AnchorOptions): Promise<AnchoredStore> {
  const tree = buildMerkleTree([]);
  const counter = await options.counter.read();
  const resets = (await options.counter.orderly?.resets()) ?? 0;
  const audit = options.auditHead();
  const anchor = sealAnchor(options.keys.current, {
    root: tree.root,
    counter,
    audit,
    resets,
    isUnclean: false,
  });
  const isFirst =
    (await store.list(undefined, 1)).length === 0 &&
    (await store.commit([{ key: ANCHOR_KEY, expectedVersion: 0, value: anchor }]));
  if (!isFirst)
    throw new ManagerError('already-initialised', 'the store is not empty; it is not anchored again');
  return new GroupCommitStore(
    store,
    tree,
    { anchorVersion: 1, counter, audit, resets, isUnclean: false },
    options,
  );
}

/**
 * Reads the whole store and compares it with its anchor, and the anchor with the TPM.
 * @param roots of the same store before it was lost; absent at the start of the manager
 * @throws ManagerError `store-missing` (empty), `store-corrupt`, `rollback-detected`, `newer-format`, and the TPM's
 */
export async function openAnchoredStore(
  store: StateStore,
  options: AnchorOptions,
  roots?: readonly Uint8Array[],
): Promise<AnchoredStore> {
  const { leaves, anchor } = await readAll(store, options);
  if (!anchor) {
    if (leaves.length > 0) throw corrupt('its anchor was removed');
    throw new ManagerError(
      'store-missing',
      'the store is empty: its set-up did not finish, or it was emptied',
    );
  }
  const stated = openAnchor(options.keys, anchor.value);
  const tree = buildMerkleTree(leaves);
  if (!bytesEqual(tree.root, stated.root)) {
    throw new ManagerError(
      'rollback-detected',
      'the store is not what was last written: a record was put back, replaced, removed or added behind the manager',
    );
  }
  // Only this process knows of the writes that the TPM has not counted yet.
  if (roots && !roots.some((newest) => bytesEqual(newest, stated.root))) {
    throw new ManagerError(
      'rollback-detected',
      'the store was put back to an older state while the manager was running; restore the newest one',
    );
  }
  let anchorVersion = anchor.version;
  const reconciled = await reconcile(options.counter, stated, async (next) => {
    const value = sealAnchor(options.keys.current, next);
    const isWritten = await store.commit([{ key: ANCHOR_KEY, expectedVersion: anchorVersion, value }]);
    if (!isWritten) throw corrupt('it was changed while it was being opened');
    anchorVersion++;
  });
  const opened = { anchorVersion, audit: stated.audit, ...reconciled };
  return new GroupCommitStore(store, tree, opened, options);
}

async function readAll(
  store: StateStore,
  { onEntry }: AnchorOptions,
): Promise<{ leaves: LeafChange[]; anchor: StoreEntry | undefined }> {
  const leaves: LeafChange[] = [];
  let anchor: StoreEntry | undefined;
  for await (const page of pagesOf(store)) {
    for (const entry of page) {
      const { key, version, value } = entry;
      onEntry?.(entry);
      if (key === ANCHOR_KEY) anchor = entry;
      else leaves.push({ key, version, digest: valueDigest(value) });
    }
  }
  return { leaves, anchor };
}

function corrupt(what: string): ManagerError {
  return new ManagerError('store-corrupt', `the store is damaged: ${what}; restore it from a backup`);
}
