import assert from 'node:assert/strict';
import { createHash } from 'node:crypto';
import fc from 'fast-check';
import { ManagerError } from 'vtpm-manager/error';
import { buildMerkleTree, type LeafChange, valueDigest } from 'vtpm-manager/store/merkle-tree';
import { isA } from '../support/is-a.js';

// Few keys, so that changes meet; some of them share a bucket (see the last test).
const leaf = fc.record({
  key: fc.integer({ min: 0, max: 40 }).map((n) => `vtpm/${n}`),
  version: fc.integer({ min: 1, max: Number.MAX_SAFE_INTEGER }),
  digest: fc.uint8Array({ minLength: 32, maxLength: 32 }),
});
const leaves = fc.uniqueArray(leaf, { selector: ({ key }) => key, maxLength: 40 });

function merged(...batches: LeafChange[][]): LeafChange[] {
  return [...new Map(batches.flat().map((change) => [change.key, change])).values()];
}

describe('Merkle tree', () => {
  it('I-5 has after any changes the root of a tree built anew', () => {
    fc.assert(
      fc.property(leaves, fc.array(leaves, { maxLength: 6 }), (start, batches) => {
        const tree = buildMerkleTree(start);
        for (const [index, batch] of batches.entries()) {
          const staged = tree.stage(batch);
          const before = tree.root;
          assert.deepEqual(tree.root, before, 'staging alone changes nothing');
          staged.apply();
          assert.deepEqual(tree.root, staged.root);
          const all = merged(start, ...batches.slice(0, index + 1));
          assert.deepEqual(tree.root, buildMerkleTree(all).root);
          assert.equal(tree.size, all.length);
        }
      }),
    );
  });

  it('does not depend on the order in which records came', () => {
    fc.assert(
      fc.property(leaves, (start) => {
        assert.deepEqual(buildMerkleTree(start).root, buildMerkleTree(start.toReversed()).root);
      }),
    );
  });

  it('I-5 has another root for any other version, value, key or set of records', () => {
    fc.assert(
      fc.property(leaves, leaf, fc.nat(), (start, other, at) => {
        const root = buildMerkleTree(start).root;
        const at1 = start[at % Math.max(1, start.length)];
        if (!at1) return;
        const rest = start.filter(({ key }) => key !== at1.key);
        const flipped = Buffer.from(at1.digest);
        flipped.writeUInt8(flipped.readUInt8(at % 32) ^ 1, at % 32);
        const changes: LeafChange[][] = [
          rest,
          [...rest, { ...at1, version: at1.version - 1 }],
          [...rest, { ...at1, digest: flipped }],
          [...rest, { ...at1, key: `${at1.key}0000` }],
          [...start, { ...other, key: 'trust' }],
        ];
        for (const changed of changes) assert.notDeepEqual(buildMerkleTree(changed).root, root);
      }),
    );
  });

  it('lists keys in the order of their bytes, page by page', () => {
    fc.assert(
      fc.property(leaves, leaves, fc.integer({ min: 1, max: 7 }), (start, batch, limit) => {
        const tree = buildMerkleTree(start);
        tree.stage(batch).apply();
        const listed: string[] = [];
        for (let after: string | undefined; ; after = listed.at(-1)) {
          const page = tree.keys(after, limit);
          if (page.length === 0) break;
          assert.ok(page.length <= limit);
          listed.push(...page);
        }
        const expected = merged(start, batch).map(({ key }) => Buffer.from(key));
        assert.deepEqual(
          listed.map((key) => Buffer.from(key)),
          expected.sort(Buffer.compare),
        );
      }),
    );
  });

  it('gives back each leaf, before and after it grows', () => {
    const tree = buildMerkleTree([]);
    const all = Array.from({ length: 500 }, (_, i) => ({
      key: `vtpm/${i}`,
      version: i + 1,
      digest: valueDigest(Buffer.from(`value ${i}`)),
    }));
    for (const change of all) tree.stage([change]).apply();
    for (const { key, version, digest } of all) {
      assert.deepEqual({ ...tree.get(key) }, { version, digest });
    }
    assert.equal(tree.get('vtpm/500'), undefined);
  });

  it('does not apply what was staged before another change', () => {
    const tree = buildMerkleTree([]);
    const digest = valueDigest(Buffer.from('x'));
    const late = tree.stage([{ key: 'a', version: 1, digest }]);
    tree.stage([{ key: 'b', version: 1, digest }]).apply();
    assert.throws(
      () => late.apply(),
      (error) => isA(error, ManagerError) && error.code === 'internal',
    );
    assert.throws(() => tree.stage([late, late].map(() => ({ key: 'a', version: 1, digest }))));
  });

  it('hashes buckets and nodes as its description says', () => {
    // Computed here from the description alone, over two records of one bucket and one of another.
    const sha = (...parts: Uint8Array[]) => createHash('sha256').update(Buffer.concat(parts)).digest();
    const bucketOf = (key: string) => sha(Buffer.from(key)).readUInt16BE(0) >> 4;
    const byBucket = new Map<number, string>();
    let pair: [string, string] | undefined;
    for (let i = 0; !pair; i++) {
      const key = `vtpm/${i}`;
      const mate = byBucket.get(bucketOf(key));
      if (mate !== undefined) pair = mate < key ? [mate, key] : [key, mate];
      byBucket.set(bucketOf(key), key);
    }
    const keys = [...pair, 'trust'];
    const digestOf = (key: string) => sha(Buffer.from(`value of ${key}`));
    const item = (key: string, version: number) => {
      const head = Buffer.alloc(10 + key.length);
      head.writeUInt16BE(key.length, 0);
      head.write(key, 2);
      head.writeBigUInt64BE(BigInt(version), 2 + key.length);
      return Buffer.concat([head, digestOf(key)]);
    };
    let level = Array.from({ length: 4096 }, (_, bucket) =>
      sha(
        Buffer.from([0]),
        ...keys.flatMap((key, index) => (bucketOf(key) === bucket ? [item(key, index + 1)] : [])),
      ),
    );
    while (level.length > 1) {
      level = Array.from({ length: level.length / 2 }, (_, i) =>
        sha(Buffer.from([1]), level[2 * i]!, level[2 * i + 1]!),
      );
    }
    const tree = buildMerkleTree(keys.map((key, i) => ({ key, version: i + 1, digest: digestOf(key) })));
    assert.deepEqual(tree.root, level[0]);
  });
});
