import { barrier } from 'vtpm-common';
import { bytesEqual } from 'vtpm-proto';
import type { AuditHead } from '../audit/index.js';
import { ManagerError } from '../error.js';
import type { KeyHierarchy } from '../keys/index.js';
import type { AnchorCounter } from '../root-tpm/index.js';
import { ANCHOR_KEY, type AnchorFacts, openAnchor, sealAnchor } from './anchor.js';
import { MAX_BATCH_BYTES, MAX_BATCH_WRITES } from './limits.js';
import { buildMerkleTree, type LeafChange, valueDigest } from './merkle-tree.js';
import { pagesOf } from './pages.js';
import type { StateStore, StoreEntry, StoreWrite } from './state-store.js';

/** What a store says of itself, and whether that is so. For `recover`, which is told what a start refuses. */
export interface StoreVerdict {
  /** Undefined where the anchor is missing or not authentic. */
  readonly anchor: AnchorFacts | undefined;
  /** The records are those of the anchor. */
  readonly isWhole: boolean;
}

/** Reads every record; what is no record of ours is for `take` to refuse. */
export async function examineStore(
  store: StateStore,
  keys: KeyHierarchy,
  take: (entry: StoreEntry) => void,
): Promise<StoreVerdict> {
  const leaves: LeafChange[] = [];
  let anchor: AnchorFacts | undefined;
  for await (const entry of entriesOf(store)) {
    if (entry.key === ANCHOR_KEY) {
      anchor = authentic(keys, entry.value);
      continue;
    }
    leaves.push({ key: entry.key, version: entry.version, digest: valueDigest(entry.value) });
    take(entry);
  }
  return { anchor, isWhole: anchor !== undefined && bytesEqual(buildMerkleTree(leaves).root, anchor.root) };
}

/**
 * Takes a store as it is for the newest one, after `spoilAnchor`. First every record is written as `change` has it, then
 * one anchor that fits, which the TPM counts. A crash leaves a store that is refused as before, and this is repeated.
 * @param change the new value, or undefined where the record stays; `count` is what the TPM shows at the end
 * @param beforeAnchor called when every record is as it will be
 */
export async function adoptStore(
  store: StateStore,
  keys: KeyHierarchy,
  counter: AnchorCounter,
  audit: () => AuditHead,
  change: (entry: StoreEntry, count: bigint) => Uint8Array | undefined,
  beforeAnchor: () => Promise<void>,
): Promise<void> {
  // Counted before too: there may be a disk whose anchor says the next value and was never counted.
  const shown = await counter.increment();
  const resets = (await counter.orderly?.resets()) ?? 0;
  const leaves: LeafChange[] = [];
  let anchorVersion = 0;
  let batch: StoreWrite[] = [];
  let bytes = 0;
  const flush = async (): Promise<void> => {
    if (batch.length > 0 && !(await store.commit(batch))) throw changed();
    barrier('recover.written');
    batch = [];
    bytes = 0;
  };
  for await (const entry of entriesOf(store)) {
    if (entry.key === ANCHOR_KEY) {
      anchorVersion = entry.version;
      continue;
    }
    const value = change(entry, shown + 1n);
    const version = value ? entry.version + 1 : entry.version;
    leaves.push({ key: entry.key, version, digest: valueDigest(value ?? entry.value) });
    if (!value) continue;
    batch.push({ key: entry.key, expectedVersion: entry.version, value });
    bytes += value.length;
    if (batch.length >= MAX_BATCH_WRITES || bytes >= MAX_BATCH_BYTES / 2) await flush();
  }
  await flush();
  await beforeAnchor();
  const root = buildMerkleTree(leaves).root;
  const anchor = sealAnchor(keys.current, {
    root,
    counter: shown + 1n,
    audit: audit(),
    resets,
    isUnclean: false,
  });
  const isWritten = await store.commit([{ key: ANCHOR_KEY, expectedVersion: anchorVersion, value: anchor }]);
  if (!isWritten) throw changed();
  barrier('recover.anchored');
  if ((await counter.increment()) !== shown + 1n) {
    throw new ManagerError(
      'rollback-detected',
      "somebody else counts with the TPM's counter; stop it and repeat",
    );
  }
}

/**
 * Makes a store that no start takes, whatever the TPM's counter shows, until `adoptStore` has written the anchor that
 * fits. An anchor that is none already stays.
 */
export async function spoilAnchor(store: StateStore, keys: KeyHierarchy): Promise<void> {
  const entry = await store.get(ANCHOR_KEY);
  const stated = entry && authentic(keys, entry.value);
  if (!entry || !stated) return;
  await overwrite(store, ANCHOR_KEY, sealAnchor(keys.current, { ...stated, root: Buffer.alloc(32) }));
  barrier('recover.spoilt');
}

/** Puts a record beside the others, whatever was there, before the store is adopted. */
export async function overwrite(store: StateStore, key: string, value: Uint8Array): Promise<void> {
  const entry = await store.get(key);
  if (!(await store.commit([{ key, expectedVersion: entry?.version ?? 0, value }]))) throw changed();
}

/** What the anchor says, without a look at the records. @returns undefined where it is missing or not authentic */
export async function readAnchor(store: StateStore, keys: KeyHierarchy): Promise<AnchorFacts | undefined> {
  const entry = await store.get(ANCHOR_KEY);
  return entry && authentic(keys, entry.value);
}

function authentic(keys: KeyHierarchy, anchor: Uint8Array): AnchorFacts | undefined {
  try {
    return openAnchor(keys, anchor);
  } catch (error) {
    if (error instanceof ManagerError && ['store-corrupt', 'rollback-detected'].includes(error.code))
      return undefined;
    throw error;
  }
}

/** Every record in order, page by page. @throws ManagerError `store-corrupt` */
export async function* entriesOf(store: StateStore): AsyncGenerator<StoreEntry> {
  for await (const page of pagesOf(store)) yield* page;
}

function changed(): ManagerError {
  return new ManagerError('store-corrupt', 'the store was changed meanwhile; repeat');
}
