import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { existsSync, linkSync, mkdirSync, readdirSync, renameSync, rmSync, statSync } from 'node:fs';
import { join } from 'node:path';
import fc from 'fast-check';
import { pathsOf } from 'vtpm-common';
import {
  type AuditEvent,
  type AuditLog,
  createAuditLog,
  decodeAuditHead,
  EMPTY_HEAD,
  encodeAuditHead,
  openAuditLog,
  verifyAudit,
} from 'vtpm-manager/audit/index';
import { SmallDisk } from '../support/small-disk.js';
import { AuditFixture, appendAll, collect, load } from './audit-fixture.js';
import { refusal } from './store-fixture.js';

const HOOK = Symbol.for('vtpm.barrier');

/** Runs `body` while `hook` is called at each barrier. */
async function withBarriers(hook: (name: string) => void, body: () => Promise<void>): Promise<void> {
  const scope = globalThis as { [HOOK]?: (name: string) => void };
  scope[HOOK] = hook;
  try {
    await body();
  } finally {
    delete scope[HOOK];
  }
}

describe('audit log', () => {
  let fixture: AuditFixture;
  beforeEach(() => {
    fixture = new AuditFixture();
  });
  afterEach(() => fixture.destroy());

  it('gives back what was appended, over a restart', async () => {
    const log = await fixture.create();
    const events: AuditEvent[] = [
      { actor: 'manager', action: 'init', verdict: 'done' },
      { actor: { uid: 0 }, action: 'image-allow', verdict: 'done', facts: { digest: 'ab', note: 'ünïcode' } },
      load(2n ** 64n - 1n, { verdict: 'refused', reason: { code: 'stale-epoch', message: 'ask again' } }),
      { actor: { toolstackKey: 'ff'.repeat(32) }, action: 'migrate-out', verdict: 'intended', epoch: 3n },
    ];
    for (const event of events) await log.append(event);
    const before = await log.tail(10);
    assert.deepEqual(
      before.map(({ n, time, ...event }) => event),
      events,
    );
    assert.deepEqual(
      before.map(({ n }) => n),
      [1n, 2n, 3n, 4n],
    );
    for (const { time } of before) assert.equal(new Date(time).toISOString(), time);
    const { head } = log;
    await log.close();
    const { log: again, unanchored, wasTorn } = await fixture.open(head);
    assert.deepEqual({ unanchored, wasTorn, head: again.head }, { unanchored: 0n, wasTorn: false, head });
    assert.deepEqual(await again.tail(10), before);
    assert.equal((await again.append(load(1n))).length, 5n);
    assert.deepEqual((await again.tail(2)).at(0), before.at(-1));
    assert.deepEqual(await again.tail(0), []);
  });

  it('is a file beside the store that only its owner may read', async () => {
    await fixture.create();
    assert.equal(statSync(fixture.path).mode & 0o777, 0o600);
    assert.equal(pathsOf('/a', '/b').manager.audit, '/a/manager/audit.log');
  });

  it('I-9 is never begun anew where there is one, nor where it is missing', async () => {
    const [head] = await fixture.write(1);
    await assert.rejects(fixture.create(), refusal('already-initialised'));
    rmSync(fixture.path);
    await assert.rejects(
      fixture.open(head!),
      refusal('audit-corrupt', /entry 1 is missing, as is the whole/),
    );
    await assert.rejects(fixture.open(EMPTY_HEAD), refusal('audit-corrupt', /entry 1 is missing/));
    assert.ok(!existsSync(fixture.path));
  });

  it('has a head of 40 bytes for the anchor', async () => {
    const [head] = await fixture.write(1);
    const bytes = encodeAuditHead(head!);
    assert.equal(bytes.length, 40);
    assert.deepEqual(decodeAuditHead(bytes), head);
    assert.throws(() => decodeAuditHead(bytes.subarray(1)), refusal('store-corrupt'));
  });

  it('refuses whatever comes after it was closed', async () => {
    const log = await fixture.create();
    const last = log.append(load(1n));
    await log.close();
    assert.equal((await last).length, 1n);
    await assert.rejects(log.append(load(1n)), refusal('shutting-down'));
  });

  describe('writes', () => {
    it('are shared by entries that come together, and by those that come meanwhile', async () => {
      const log = await fixture.create();
      const late: Promise<unknown>[] = [];
      let syncs = 0;
      const hook = (name: string): void => {
        if (name === 'audit.written' && late.length === 0) {
          for (let i = 0; i < 50; i++) late.push(log.append(load(2n)));
        }
        if (name === 'audit.synced') syncs++;
      };
      await withBarriers(hook, async () => {
        await Promise.all(Array.from({ length: 100 }, () => log.append(load(1n))));
        assert.equal(syncs, 1);
        await Promise.all(late);
      });
      assert.equal(syncs, 2);
      assert.equal(log.head.length, 150n);
      const { entries, ...report } = { entries: fixture.lines().length, ...(await log.verify()) };
      assert.equal(entries, 150);
      assert.equal(report.authenticated, 150n);
    });

    it('resolve with the head of their own entry, in the order of the calls', async () => {
      const log = await fixture.create();
      const heads = await Promise.all([1n, 2n, 3n].map((generation) => log.append(load(generation))));
      assert.deepEqual(
        heads.map(({ length }) => length),
        [1n, 2n, 3n],
      );
      assert.deepEqual(heads.at(-1), log.head);
      assert.deepEqual(
        (await log.tail(3)).map(({ generation }) => generation),
        [1n, 2n, 3n],
      );
      await log.close();
      // Each of them is one that an anchor may hold.
      for (const head of heads) assert.equal((await fixture.open(head)).unanchored, 3n - head.length);
    });

    it('fail by name on a full disk, leave no part of an entry, and work again with room', async () => {
      const disk = SmallDisk.mount(join(fixture.directory, 'disk'), '8m');
      try {
        const path = join(disk.path, 'audit.log');
        const log = await createAuditLog(path, fixture.key);
        await log.append(load(1n));
        disk.fill(0);
        const facts = Object.fromEntries(Array.from({ length: 16 }, (_, i) => [`f${i}`, 'x'.repeat(256)]));
        // More than is left of the last page: some of it is written.
        const many = Array.from({ length: 4 }, () => log.append(load(2n, { facts })));
        for (const result of await Promise.allSettled(many)) {
          assert.equal(result.status, 'rejected');
          assert.ok(refusal('store-full', /make room/)(result.reason));
        }
        assert.equal(fixture.lines(path).length, 1);
        assert.equal(log.head.length, 1n);
        disk.clear();
        const head = await log.append(load(3n));
        assert.equal(head.length, 2n);
        await log.close();
        const { log: again, wasTorn } = await openAuditLog(path, { current: fixture.key }, head);
        assert.equal(wasTorn, false);
        await again.close();
      } finally {
        disk.unmount();
      }
    });

    it('fail by name where the next file cannot be begun, and begin it with room', async () => {
      const disk = SmallDisk.mount(join(fixture.directory, 'disk'), '4m');
      try {
        const path = join(disk.path, 'audit.log');
        const log = await createAuditLog(path, fixture.key, { segmentBytes: 1 });
        await log.append(load(1n));
        disk.fill(0);
        await assert.rejects(log.append(load(2n)), refusal('store-full'));
        await assert.rejects(log.append(load(2n)), refusal('store-full'));
        disk.clear();
        await log.append(load(3n));
        assert.deepEqual(
          (await log.tail(5)).map(({ generation }) => generation),
          [1n, 3n],
        );
        assert.equal((await log.verify()).flaw, undefined);
        await log.close();
      } finally {
        disk.unmount();
      }
    });
  });

  describe('text from outside', () => {
    it('cannot forge a line, hide one or steer a terminal', async () => {
      const log = await fixture.create();
      await log.append(load(1n));
      const [line] = fixture.lines();
      const hostile = fc.oneof(
        fc.string({ unit: 'binary', maxLength: 2000 }),
        fc.string({ unit: 'grapheme' }),
        fc.constantFrom(
          `\n${line}\n`,
          `"}\n${line}`,
          '\r\n\0',
          '\u2028\u2029\u0085',
          '\x1b[2J\x9b1A',
          '\u202e',
          '\ud800',
        ),
      );
      let count = 1;
      await fc.assert(
        fc.asyncProperty(hostile, hostile, async (message, fact) => {
          const reason = { code: message, message };
          await log.append(load(1n, { actor: { worker: fact }, reason, facts: { note: fact } }));
          const lines = fixture.lines();
          assert.equal(lines.length, ++count);
          assert.match(lines.at(-1) ?? '', /^[ -~]+$/);
          const [entry] = await log.tail(1);
          // Bounded text comes back as it was; longer text as its beginning.
          const kept = entry?.reason?.message ?? '';
          assert.ok(kept === message || (message.length > 1000 && message.startsWith(kept.slice(0, -1))));
          assert.ok(kept.length <= 1000 && (entry?.facts?.note?.length ?? 0) <= 256);
        }),
        { numRuns: 60 },
      );
      assert.equal((await log.verify()).flaw, undefined);
    });

    it('of the greatest lengths fits a line', async () => {
      const log = await fixture.create();
      const text = '\u0001'.repeat(5000);
      const facts = Object.fromEntries(Array.from({ length: 16 }, (_, i) => [`f${i}`, text]));
      await log.append(load(1n, { actor: { worker: text }, reason: { code: text, message: text }, facts }));
      assert.equal((await log.verify()).flaw, undefined);
      assert.equal((await log.tail(1))[0]?.reason?.message.length, 1000);
    });

    it('is never cut in the middle of a character', async () => {
      const log = await fixture.create();
      await log.append(load(1n, { facts: { note: '😀'.repeat(200), other: `x${'😀'.repeat(200)}` } }));
      const facts = (await log.tail(1))[0]?.facts ?? {};
      for (const value of Object.values(facts)) {
        assert.equal(value, Buffer.from(value, 'utf8').toString('utf8'));
        assert.ok(value.endsWith('😀…'));
      }
    });

    it('in place of a UUID, a number or a name is refused, and alone', async () => {
      const log = await fixture.create();
      const mistakes: Partial<AuditEvent>[] = [
        { vtpm: '../../x' },
        { epoch: -1n },
        { generation: 2n ** 64n },
        { facts: { 'a b': 'x' } },
        { facts: Object.fromEntries(Array.from({ length: 17 }, (_, i) => [`f${i}`, ''])) },
      ];
      for (const mistake of mistakes) {
        await assert.rejects(log.append(load(1n, mistake)), refusal('bad-request'));
      }
      assert.equal((await log.append(load(1n))).length, 1n);
    });
  });

  describe('in several files', () => {
    const options = { segmentBytes: 1000 };
    const names = () => readdirSync(fixture.directory).sort();

    it('is one chain', async () => {
      const heads = await fixture.write(10, options);
      assert.deepEqual(names(), ['audit.000001.log', 'audit.000002.log', 'audit.000003.log', 'audit.log']);
      const { log, unanchored } = await fixture.open(heads[9]!, options);
      assert.equal(unanchored, 0n);
      const report = await log.verify();
      assert.deepEqual(report, { first: 1n, head: heads[9], authenticated: 10n, unanchored: 0n });
      const numbers = (await log.tail(8)).map(({ n }) => Number(n));
      assert.deepEqual(numbers, [3, 4, 5, 6, 7, 8, 9, 10]);
      await appendAll(log, 5);
      assert.equal((await log.verify()).authenticated, 15n);
    });

    it('exports what was asked for, as it is in the files', async () => {
      await fixture.write(10, options);
      const all = names().flatMap((name) => fixture.lines(join(fixture.directory, name)));
      const { log } = await fixture.open(EMPTY_HEAD, options);
      for (const [from, to] of [
        [1, 10],
        [4, 4],
        [3, 8],
        [9, 99],
        [5, 4],
        [11, 20],
      ] as const) {
        const text = await collect(log.exportEntries(BigInt(from), BigInt(to)));
        const expected = all.slice(from - 1, to);
        assert.deepEqual(text.split('\n').slice(0, -1), to < from ? [] : expected, `${from} to ${to}`);
      }
    });

    it('opens with an anchor from any of its entries', async () => {
      for (const head of [EMPTY_HEAD, ...(await fixture.write(10, options))]) {
        const { log, unanchored } = await fixture.open(head, options);
        assert.equal(unanchored, 10n - head.length);
        assert.equal(log.head.length, 10n);
        await log.close();
      }
    });

    it('reads at start only what is newer than the anchored entry and its file', async () => {
      const heads = await fixture.write(10, options);
      fixture.put(['damaged'], join(fixture.directory, 'audit.000001.log'));
      const { log } = await fixture.open(heads[9]!, options);
      const { flaw } = await log.verify();
      assert.equal(flaw?.entry, 1n);
      assert.equal(flaw?.path, join(fixture.directory, 'audit.000001.log'));
    });

    it('of which the oldest were moved away says from where on it was verified', async () => {
      const heads = await fixture.write(10, options);
      const { log } = await fixture.open(heads[9]!, options);
      const [, second = ''] = names();
      const first = JSON.parse(fixture.lines(join(fixture.directory, second))[0] ?? '') as { n: number };
      rmSync(join(fixture.directory, 'audit.000001.log'));
      const report = await log.verify();
      assert.equal(report.flaw, undefined);
      assert.equal(report.first, BigInt(first.n));
      assert.equal(report.authenticated, 11n - report.first);
      await assert.rejects(
        collect(log.exportEntries(1n, 10n)),
        refusal('bad-request', new RegExp(`export from ${first.n} on`)),
      );
      assert.equal((await log.tail(10)).length, 11 - first.n);
    });

    it('goes on where it ended between closing one file and beginning the next', async () => {
      const heads = await fixture.write(4, options);
      renameSync(fixture.path, join(fixture.directory, 'audit.000002.log'));
      const { log } = await fixture.open(heads[3]!, options);
      await appendAll(log, 1);
      assert.equal((await log.verify()).authenticated, 5n);
      assert.deepEqual(names(), ['audit.000001.log', 'audit.000002.log', 'audit.log']);
    });

    it('has each entry once where a file is renamed while the files are listed', async () => {
      const heads = await fixture.write(10, options);
      // As it is found when the rename comes between opening the newest file and listing the others.
      linkSync(fixture.path, join(fixture.directory, 'audit.000004.log'));
      const report = await verifyAudit(fixture.path, { current: fixture.key }, heads[9]!);
      assert.equal(report.flaw, undefined);
      assert.equal(report.authenticated, 10n);
    });

    it('refuses everything once it is not known what a file holds', async () => {
      const log = await fixture.create({ segmentBytes: 1 });
      await log.append(load(1n));
      mkdirSync(join(fixture.directory, 'audit.000001.log'));
      const results = await Promise.allSettled([log.append(load(2n)), log.append(load(3n))]);
      for (const result of results) {
        assert.ok(result.status === 'rejected' && refusal('internal', /start again/)(result.reason));
      }
      rmSync(join(fixture.directory, 'audit.000001.log'), { recursive: true });
      await assert.rejects(log.append(load(4n)), refusal('internal', /start again/));
    });

    it('is verified and exported as of one moment while it grows', async () => {
      const log = await fixture.create(options);
      await appendAll(log, 1);
      for (let i = 0; i < 20; i++) {
        const growing = appendAll(log, 20);
        const report = await log.verify();
        assert.equal(report.flaw, undefined);
        assert.equal(report.unanchored, 0n);
        const { length } = report.head;
        const text = await collect(log.exportEntries(1n, length));
        assert.equal(text.match(/\n/g)?.length, Number(length));
        await growing;
      }
      assert.equal((await log.verify()).authenticated, 401n);
    });
  });

  describe('under a new key', () => {
    const next = { id: 2, key: randomBytes(32) };
    let log: AuditLog;
    beforeEach(async () => {
      log = await fixture.create();
    });

    /** Three entries under the first key, two under the next, the switch while the first are under way. */
    async function rotated() {
      const before = [1n, 2n, 3n].map((generation) => log.append(load(generation)));
      const switched = log.withKey(next);
      const after = [4n, 5n].map((generation) => log.append(load(generation)));
      await switched;
      return { before: await Promise.all(before), after: await Promise.all(after) };
    }

    it('older entries are held by the chain, newer ones by the MAC too', async () => {
      const { before, after } = await rotated();
      const keyIds = fixture.lines().map((line) => (JSON.parse(line) as { keyId: number }).keyId);
      assert.deepEqual(keyIds, [1, 1, 1, 2, 2]);
      assert.equal((await log.verify()).authenticated, 2n);
      await log.close();
      for (const anchored of [before[2]!, ...after]) {
        const report = await verifyAudit(fixture.path, { current: next }, anchored);
        assert.equal(report.flaw, undefined);
        assert.equal(report.authenticated, 2n);
      }
      fixture.put(
        fixture.lines().with(1, fixture.lines()[1]!.replace('"generation":"2"', '"generation":"9"')),
      );
      const { flaw } = await verifyAudit(fixture.path, { current: next }, after[1]!);
      assert.equal(flaw?.entry, 3n);
      assert.match(flaw.what, /does not follow entry 2: one of the two was changed/);
    });

    it('entries of the old one that no anchor holds are refused, but not while both are known', async () => {
      const { before, after } = await rotated();
      await log.close();
      await assert.rejects(
        fixture.open(before[1]!, {}, { current: next }),
        refusal('audit-corrupt', /entry 3 is newer than the anchor and not written under the current key/),
      );
      const both = { current: next, other: fixture.key };
      const { log: again, unanchored } = await fixture.open(before[1]!, {}, both as { current: typeof next });
      assert.equal(unanchored, 3n);
      assert.deepEqual(again.head, after[1]);
    });
  });
});
