import assert from 'node:assert/strict';
import { AuditFixture, load } from '../manager/audit-fixture.js';

const COUNT = 1_000_000;
const MIB = 2 ** 20;

describe('an audit log of a million entries', () => {
  let fixture: AuditFixture;
  beforeEach(() => {
    fixture = new AuditFixture();
  });
  afterEach(() => fixture.destroy());

  it('is written and verified in bounded memory', async () => {
    const before = process.memoryUsage.rss();
    let peak = 0;
    const sampling = setInterval(() => {
      peak = Math.max(peak, process.memoryUsage.rss());
    }, 20);
    try {
      const log = await fixture.create();
      for (let i = 0; i < COUNT; i += 1000) {
        await Promise.all(Array.from({ length: 1000 }, (_, more) => log.append(load(BigInt(i + more)))));
      }
      assert.equal((await log.verify()).authenticated, BigInt(COUNT));
      assert.equal((await log.tail(1))[0]?.n, BigInt(COUNT));
    } finally {
      clearInterval(sampling);
    }
    // It has more than 300 MiB.
    assert.ok(peak - before < 150 * MIB, `took ${Math.round((peak - before) / MIB)} MiB`);
  }).timeout(300_000);
});
