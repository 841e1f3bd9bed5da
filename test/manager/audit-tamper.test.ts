import assert from 'node:assert/strict';
import { createHash, createHmac, randomBytes } from 'node:crypto';
import {
  appendFileSync,
  copyFileSync,
  readFileSync,
  renameSync,
  rmSync,
  truncateSync,
  writeFileSync,
} from 'node:fs';
import { join } from 'node:path';
import fc from 'fast-check';
import { type AuditHead, createAuditLog, verifyAudit } from 'vtpm-manager/audit/index';
import { AuditFixture, load } from './audit-fixture.js';
import { refusal } from './store-fixture.js';

const COUNT = 12;

describe('I-5 an audit log that was changed behind the manager', () => {
  let fixture: AuditFixture;
  let heads: AuditHead[];
  let bytes: Buffer;
  beforeEach(async () => {
    fixture = new AuditFixture();
    heads = await fixture.write(COUNT);
    bytes = readFileSync(fixture.path);
  });
  afterEach(() => fixture.destroy());

  const anchored = (n = COUNT): AuditHead => heads[n - 1]!;

  /** Opening refuses by this name, and verification finds the same. */
  async function assertRefused(message: RegExp, head = anchored(), current = fixture.key): Promise<void> {
    await assert.rejects(fixture.open(head, {}, { current }), refusal('audit-corrupt', message));
    const { flaw } = await verifyAudit(fixture.path, { current }, head);
    assert.match(`entry ${flaw?.entry} ${flaw?.what}`, message);
  }

  /** Number of the entry that a byte of the file belongs to. */
  const entryAt = (offset: number): number =>
    bytes.subarray(0, offset).filter((byte) => byte === 0x0a).length + 1;

  const offsets = fc.nat({ max: Number.MAX_SAFE_INTEGER }).map((x) => x % bytes.length);

  it('is opened where it was not: the control', async () => {
    const { log, unanchored } = await fixture.open(anchored());
    assert.equal(unanchored, 0n);
    assert.deepEqual(log.head, anchored());
  });

  it('in a single bit is refused with its entry', async () => {
    await fc.assert(
      fc.asyncProperty(offsets, fc.nat({ max: 7 }), async (offset, bit) => {
        const changed = Buffer.from(bytes);
        changed[offset]! ^= 1 << bit;
        writeFileSync(fixture.path, changed);
        const entry = entryAt(offset);
        // What the first entry says of itself is all there is to know its number from; one that names another key is
        // found by the next.
        const named = entry === 1 ? '\\d+ ' : `(${entry} |${entry + 1} does not follow)`;
        await assertRefused(new RegExp(`entry ${named}|entry ${COUNT} is missing: the log ends`));
      }),
      { numRuns: 400 },
    );
  });

  it('in a single byte, under keys that are no longer known, is refused by the chain', async () => {
    const current = { id: 2, key: randomBytes(32) };
    await fc.assert(
      fc.asyncProperty(offsets, fc.integer({ min: 1, max: 255 }), async (offset, difference) => {
        const changed = Buffer.from(bytes);
        changed[offset]! ^= difference;
        writeFileSync(fixture.path, changed);
        const entry = entryAt(offset);
        const named = entry === 1 ? '\\d+' : `(${entry}|${entry + 1}|${COUNT})`;
        await assertRefused(new RegExp(`entry ${named} `), anchored(), current);
      }),
      { numRuns: 200 },
    );
  });

  it('cut off anywhere before the anchored end is refused', async () => {
    await fc.assert(
      fc.asyncProperty(offsets, async (length) => {
        writeFileSync(fixture.path, bytes.subarray(0, length));
        await assertRefused(new RegExp(`entry (${entryAt(length)} is cut off|${COUNT} is missing)`));
      }),
      { numRuns: 100 },
    );
  });

  it('put back to an older whole one is refused with what is missing', async () => {
    for (let kept = 0; kept < COUNT; kept++) {
      fixture.put(fixture.lines().slice(0, kept));
      await assertRefused(new RegExp(`entry ${COUNT} is missing: the log ends with entry ${kept}`));
      writeFileSync(fixture.path, bytes);
    }
  });

  it('with lines swapped, removed or repeated is refused with the first wrong place', async () => {
    const lines = fixture.lines();
    const index = fc.nat({ max: COUNT - 1 });
    await fc.assert(
      fc.asyncProperty(index, index, async (a, b) => {
        fc.pre(a !== b);
        const [low, high] = [Math.min(a, b), Math.max(a, b)];
        fixture.put(lines.with(a, lines[b]!).with(b, lines[a]!));
        await assertRefused(
          new RegExp(
            low === 0
              ? `entry ${high + 1} `
              : `entry ${low + 1} is missing: entry ${high + 1} is in its place`,
          ),
        );
        fixture.put(lines.toSpliced(low, 1));
        await assertRefused(
          low === 0 ? /entry 2 is in the wrong place/ : new RegExp(`entry ${low + 1} is missing`),
        );
        if (low > 0) {
          fixture.put(lines.toSpliced(low, high - low));
          await assertRefused(new RegExp(`entry ${low + 1} is missing`));
        }
        fixture.put(lines.toSpliced(high, 0, lines[low]!));
        await assertRefused(new RegExp(`entry ${high + 1} is missing: entry ${low + 1} is in its place`));
      }),
      { numRuns: 60 },
    );
  });

  it('with an entry added to it is refused, under whichever key', async () => {
    const [last] = fixture.lines().slice(-1);
    const other = randomBytes(32);
    const n = COUNT + 1;
    const prev = createHash('sha256').update(last!).digest('hex');
    const body = last!
      .replace(/,"mac".*/, '')
      .replace(`"n":${COUNT}`, `"n":${n}`)
      .replace(/"prev":"[0-9a-f]+"/, `"prev":"${prev}"`);
    const mac = (key: Uint8Array) => createHmac('sha256', key).update(`vtpm.v1 audit\0${body}`).digest('hex');
    const wrong = new RegExp(`entry ${n} was not written under this installation's key`);
    for (const forged of [last!, `${body},"mac":"${mac(other)}"}`, `${body},"mac":"${'0'.repeat(64)}"}`]) {
      fixture.put([...fixture.lines().slice(0, COUNT), forged]);
      await assertRefused(forged === last ? new RegExp(`entry ${n} is missing`) : wrong);
    }
    const unknown = body.replace('"keyId":1', '"keyId":7');
    fixture.put([...fixture.lines().slice(0, COUNT), `${unknown},"mac":"${mac(other)}"}`]);
    await assertRefused(
      new RegExp(`entry ${n} is newer than the anchor and not written under the current key`),
    );
    // The key makes the difference.
    fixture.put([...fixture.lines().slice(0, COUNT), `${body},"mac":"${mac(fixture.key.key)}"}`]);
    assert.equal((await fixture.open(anchored())).unanchored, 1n);
  });

  it('with text, an endless line or NUL bytes in it is refused', async () => {
    for (const [text, message] of [
      ['{}\n', /entry 13 is not what was written/],
      ['\n', /entry 13 is not what was written/],
      ['x'.repeat(10_000_000), /entry 13 is not what was written/],
    ] as const) {
      appendFileSync(fixture.path, text);
      await assertRefused(message);
      writeFileSync(fixture.path, bytes);
    }
    writeFileSync(fixture.path, Buffer.concat([Buffer.alloc(4096), bytes]));
    await assertRefused(/entry 1 is not what was written/);
  });

  it('replaced by that of another installation, or by another history of this one, is refused', async () => {
    const other = new AuditFixture();
    await other.write(COUNT);
    copyFileSync(other.path, fixture.path);
    await other.destroy();
    await assertRefused(/entry 1 was not written under this installation's key/);
    rmSync(fixture.path);
    const log = await createAuditLog(fixture.path, fixture.key);
    for (let i = 0; i < COUNT; i++) await log.append(load(100n));
    await log.close();
    await assertRefused(new RegExp(`entry ${COUNT} is not the one that was last anchored`));
    // An anchor in between: whichever entry it holds is the one that has to be there.
    await assertRefused(/entry 5 is not the one that was last anchored/, anchored(5));
  });

  describe('after the anchored entry', () => {
    it('is cut back to whole entries where the last one is torn, and says so', async () => {
      const end = bytes.lastIndexOf(0x0a, -2) + 1;
      for (let length = end + 1; length < bytes.length; length += 17) {
        writeFileSync(fixture.path, bytes.subarray(0, length));
        const report = await verifyAudit(fixture.path, { current: fixture.key }, anchored(5));
        assert.deepEqual(report.torn, { path: fixture.path, offset: end });
        assert.equal(readFileSync(fixture.path).length, length, 'verification changes nothing');
        const { log, unanchored, wasTorn } = await fixture.open(anchored(5));
        assert.deepEqual({ unanchored, wasTorn }, { unanchored: BigInt(COUNT - 6), wasTorn: true });
        assert.equal(readFileSync(fixture.path).length, end);
        assert.equal((await log.append(load(1n))).length, BigInt(COUNT));
        await log.close();
      }
    });

    it('is cut back where the file grew and its content did not reach the disk', async () => {
      const start = bytes.indexOf('"n":9') - '{"format":1,'.length;
      for (const hole of [start, start + 100]) {
        const holed = Buffer.from(bytes).fill(0, hole, hole + 700);
        writeFileSync(fixture.path, holed);
        const { log, wasTorn } = await fixture.open(anchored(8));
        assert.equal(wasTorn, true);
        assert.equal(log.head.length, 8n);
        await log.close();
        writeFileSync(fixture.path, holed);
        await assertRefused(/entry 9 is not what was written/, anchored(9));
      }
    });

    it('is never taken with a change in it', async () => {
      await fc.assert(
        fc.asyncProperty(offsets, fc.integer({ min: 1, max: 255 }), async (offset, difference) => {
          const changed = Buffer.from(bytes);
          changed[offset]! ^= difference;
          writeFileSync(fixture.path, changed);
          const entry = entryAt(offset);
          const { flaw, torn, head } = await verifyAudit(fixture.path, { current: fixture.key }, anchored(4));
          assert.ok(flaw || (torn && entry > 4), 'refused, or cut off');
          assert.ok(head.length < entry);
        }),
        { numRuns: 200 },
      );
    });
  });

  describe('of several files', () => {
    const file = (n: number) => join(fixture.directory, `audit.${String(n).padStart(6, '0')}.log`);
    beforeEach(async () => {
      rmSync(fixture.path);
      heads = await fixture.write(COUNT, { segmentBytes: 1000 });
    });

    const flawOf = async () => (await verifyAudit(fixture.path, { current: fixture.key }, anchored())).flaw;

    it('one of which was removed, swapped or emptied is found by verification', async () => {
      assert.equal(await flawOf(), undefined);
      renameSync(file(2), file(99));
      assert.match((await flawOf())?.what ?? '', /is missing: entry/);
      renameSync(file(1), file(2));
      assert.match((await flawOf())?.what ?? '', /is in the wrong place/);
      renameSync(file(2), file(1));
      renameSync(file(99), file(2));
      assert.equal(await flawOf(), undefined);
      truncateSync(file(2), 0);
      assert.match((await flawOf())?.what ?? '', /is missing: entry/);
    });

    it('the newest of which was removed is refused at start', async () => {
      rmSync(fixture.path);
      await assertRefused(new RegExp(`entry ${COUNT} is missing: the log ends with entry`));
    });

    it('that of the anchored entry was removed is refused at start, whatever is authentic after it', async () => {
      rmSync(file(1));
      await assertRefused(/entry 1 is missing: its file was removed/, anchored(1));
    });

    it('the newest of which has a torn first line, or nothing yet, goes on under its number', async () => {
      const whole = fixture.lines(file(3)).length;
      const [first = ''] = fixture.lines();
      for (const begun of ['', first.slice(0, 50)]) {
        writeFileSync(fixture.path, begun);
        const { log, wasTorn } = await fixture.open(anchored(9));
        assert.equal(wasTorn, begun !== '');
        await log.append(load(1n));
        assert.equal((await log.verify()).flaw, undefined);
        assert.equal((JSON.parse(fixture.lines()[0] ?? '') as { segment: number }).segment, 4);
        await log.close();
      }
      assert.equal(whole, 3);
    });

    it('one of which lost its beginning is found: it was not moved away whole', async () => {
      rmSync(file(1));
      assert.equal(await flawOf(), undefined);
      fixture.put(fixture.lines(file(2)).slice(1), file(2));
      assert.match(
        (await flawOf())?.what ?? '',
        /is in the wrong place: the beginning of its file is missing/,
      );
    });
  });
});
