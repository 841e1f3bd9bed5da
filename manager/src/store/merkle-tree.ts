import { hash } from 'node:crypto';
import { ManagerError } from '../error.js';

/**
 * What the newest store holds, in memory: of each record its version and the SHA-256 of its value, and over all of
 * them one root. Records are spread over 4096 buckets by the SHA-256 of their key; the buckets' digests are the leaves
 * of a binary tree, so that a changed record costs its bucket and 12 nodes.
 *
 *     bucket = SHA-256(0x00 | (keyLength u16 | key | version u64 | value digest)*)    in the order of the keys
 *     node   = SHA-256(0x01 | left | right)
 *
 * A bucket is never read as a node nor the reverse, and the root depends on nothing but the records.
 */
export interface MerkleTree {
  readonly size: number;
  /** Of its tables; the keys come on top. */
  readonly bytes: number;
  /** 32 bytes. */
  readonly root: Buffer;
  /** The digest is a view: it changes with the record. */
  get(key: string): Leaf | undefined;
  /** Up to `limit` keys greater than `after`, ascending. */
  keys(after: string | undefined, limit: number): string[];
  /** The tree as it will be with `changes`, at most one for each key. Nothing changes until `apply`. */
  stage(changes: readonly LeafChange[]): StagedTree;
}

export interface Leaf {
  readonly version: number;
  /** SHA-256 of the value, 32 bytes. */
  readonly digest: Uint8Array;
}

export interface LeafChange extends Leaf {
  readonly key: string;
}

export interface StagedTree {
  readonly root: Buffer;
  /** @throws ManagerError `internal` where the tree has changed since `stage` */
  apply(): void;
}

/** A tree over `leaves`, each key once. */
export function buildMerkleTree(leaves: Iterable<LeafChange>): MerkleTree {
  return new ArrayMerkleTree(leaves);
}

export function valueDigest(value: Uint8Array): Buffer {
  return hash('sha256', value, 'buffer');
}

const BUCKETS = 4096;
const DIGEST = 32;
const BUCKET_TAG = 0;
const NODE_TAG = 1;

function bucketOf(key: string): number {
  return valueDigest(Buffer.from(key, 'latin1')).readUInt16BE(0) >> 4;
}

class ArrayMerkleTree implements MerkleTree {
  // A record costs its key, a slot number twice and 40 bytes: objects for each would take several times that.
  readonly #slots = new Map<string, number>();
  #versions = new Float64Array(64);
  #digests = Buffer.alloc(64 * DIGEST);
  readonly #buckets: string[][] = Array.from({ length: BUCKETS }, () => []);
  readonly #sorted: string[] = [];
  /** Node 1 is the root, node i has the children 2i and 2i + 1, bucket b is node BUCKETS + b. */
  readonly #nodes = Buffer.from(EMPTY_NODES);
  #revision = 0;

  constructor(leaves: Iterable<LeafChange>) {
    for (const leaf of leaves) {
      this.#put(leaf);
      this.#sorted.push(leaf.key);
      this.#buckets[bucketOf(leaf.key)]?.push(leaf.key);
    }
    this.#sorted.sort(byCode);
    for (const keys of this.#buckets) keys.sort(byCode);
    const filled = this.#buckets.flatMap((keys, bucket): [number, string[]][] =>
      keys.length > 0 ? [[bucket, keys]] : [],
    );
    for (const [node, digest] of this.#digestsAbove(filled, NOTHING)) this.#setNode(node, digest);
  }

  get size(): number {
    return this.#slots.size;
  }

  get bytes(): number {
    return this.#versions.byteLength + this.#digests.length + this.#nodes.length;
  }

  get root(): Buffer {
    return Buffer.from(this.#node(1));
  }

  get(key: string): Leaf | undefined {
    const slot = this.#slots.get(key);
    return slot === undefined ? undefined : this.#leaf(slot);
  }

  keys(after: string | undefined, limit: number): string[] {
    const from = after === undefined ? 0 : upperBound(this.#sorted, after);
    return this.#sorted.slice(from, from + limit);
  }

  stage(changes: readonly LeafChange[]): StagedTree {
    const changed = new Map(changes.map((change) => [change.key, change]));
    if (changed.size !== changes.length) throw new ManagerError('internal', 'a key is staged twice');
    const nodes = this.#stageNodes(changed);
    const revision = this.#revision;
    return {
      root: nodes.get(1) ?? this.root,
      apply: () => {
        if (revision !== this.#revision) throw new ManagerError('internal', 'the tree has changed since');
        this.#revision++;
        for (const change of changes) this.#insert(change);
        for (const [node, digest] of nodes) this.#setNode(node, digest);
      },
    };
  }

  #stageNodes(changed: ReadonlyMap<string, LeafChange>): Map<number, Buffer> {
    const added = new Map<number, string[]>();
    for (const key of changed.keys()) {
      const bucket = bucketOf(key);
      const news = added.get(bucket) ?? [];
      if (!this.#slots.has(key)) news.push(key);
      added.set(bucket, news);
    }
    const buckets = [...added].map(([bucket, news]): [number, string[]] => {
      const old = this.#buckets[bucket] ?? [];
      return [bucket, news.length === 0 ? old : [...old, ...news].sort(byCode)];
    });
    return this.#digestsAbove(buckets, changed);
  }

  /** The digests of some buckets, which hold these keys, and of all nodes above them. */
  #digestsAbove(
    buckets: readonly [number, readonly string[]][],
    changed: ReadonlyMap<string, LeafChange>,
  ): Map<number, Buffer> {
    const nodes = new Map<number, Buffer>();
    for (const [bucket, keys] of buckets) nodes.set(BUCKETS + bucket, this.#bucketDigest(keys, changed));
    const current = (node: number): Uint8Array => nodes.get(node) ?? this.#node(node);
    let level = new Set([...nodes.keys()].map((node) => node >> 1));
    while (level.size > 0 && !level.has(0)) {
      for (const node of level) nodes.set(node, nodeDigest(current(2 * node), current(2 * node + 1)));
      level = new Set([...level].map((node) => node >> 1));
    }
    return nodes;
  }

  #insert(change: LeafChange): void {
    const { key } = change;
    if (!this.#slots.has(key)) {
      const bucket = this.#buckets[bucketOf(key)] ?? [];
      bucket.splice(upperBound(bucket, key), 0, key);
      this.#sorted.splice(upperBound(this.#sorted, key), 0, key);
    }
    this.#put(change);
  }

  #put({ key, version, digest }: LeafChange): void {
    let slot = this.#slots.get(key);
    if (slot === undefined) {
      slot = this.#slots.size;
      this.#slots.set(key, slot);
      if (slot === this.#versions.length) this.#grow();
    }
    this.#versions[slot] = version;
    this.#digests.set(digest, slot * DIGEST);
  }

  #grow(): void {
    const versions = new Float64Array(2 * this.#versions.length);
    versions.set(this.#versions);
    this.#versions = versions;
    this.#digests = Buffer.concat([this.#digests], 2 * this.#digests.length);
  }

  #leaf(slot: number): Leaf {
    const at = slot * DIGEST;
    return { version: this.#versions[slot] ?? 0, digest: this.#digests.subarray(at, at + DIGEST) };
  }

  #bucketDigest(keys: readonly string[], changed: ReadonlyMap<string, LeafChange>): Buffer {
    const bucket = Buffer.allocUnsafe(keys.reduce((sum, key) => sum + 10 + key.length + DIGEST, 1));
    bucket[0] = BUCKET_TAG;
    let at = 1;
    for (const key of keys) {
      const leaf = changed.get(key) ?? this.get(key);
      if (!leaf) throw new ManagerError('internal', `${key} is in a bucket but not in the tree`);
      at = bucket.writeUInt16BE(key.length, at);
      at += bucket.write(key, at, 'latin1');
      at = bucket.writeUInt32BE(Math.floor(leaf.version / 2 ** 32), at);
      at = bucket.writeUInt32BE(leaf.version % 2 ** 32, at);
      bucket.set(leaf.digest, at);
      at += DIGEST;
    }
    return valueDigest(bucket);
  }

  #node(node: number): Buffer {
    return this.#nodes.subarray(node * DIGEST, (node + 1) * DIGEST);
  }

  #setNode(node: number, digest: Uint8Array): void {
    this.#nodes.set(digest, node * DIGEST);
  }
}

/** The nodes of a tree without records: one digest for each level. */
function emptyNodes(): Buffer {
  const nodes = Buffer.alloc(2 * BUCKETS * DIGEST);
  let digest: Uint8Array = valueDigest(Buffer.from([BUCKET_TAG]));
  for (let first = BUCKETS; first >= 1; first >>= 1) {
    nodes.fill(digest, first * DIGEST, 2 * first * DIGEST);
    digest = nodeDigest(digest, digest);
  }
  return nodes;
}

const NOTHING: ReadonlyMap<string, LeafChange> = new Map();

/** One for all: memory of its own for each would cost more than its digest. */
const nodeBytes = Buffer.alloc(1 + 2 * DIGEST, NODE_TAG);

function nodeDigest(left: Uint8Array, right: Uint8Array): Buffer {
  nodeBytes.set(left, 1);
  nodeBytes.set(right, 1 + DIGEST);
  return valueDigest(nodeBytes);
}

// Code units, the order of LMDB; localeCompare has another one.
function byCode(a: string, b: string): number {
  return a < b ? -1 : a > b ? 1 : 0;
}

/** Where the first element greater than `key` is. */
function upperBound(sorted: readonly string[], key: string): number {
  let low = 0;
  let high = sorted.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if ((sorted[middle] ?? '') <= key) low = middle + 1;
    else high = middle;
  }
  return low;
}

const EMPTY_NODES = emptyNodes();
