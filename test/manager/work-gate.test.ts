import assert from 'node:assert/strict';
import { setImmediate as turn } from 'node:timers/promises';
import fc from 'fast-check';
import { type AdmittedConnection, Bucket, CallLimits, DEFAULT_LIMITS } from 'vtpm-manager/grpc/limits';
import { WorkGate } from 'vtpm-manager/ownership/work-gate';

describe('the gate of saves that are worked on', () => {
  it('lets in no more than its limit, in the order of arrival, and everybody in the end', async () => {
    const limit = 100;
    const sizes = fc.array(fc.integer({ min: 1, max: 150 }), { minLength: 1, maxLength: 40 });
    await fc.assert(
      fc.asyncProperty(sizes, async (all) => {
        const gate = new WorkGate(limit);
        const entered: number[] = [];
        const inside: { bytes: number; leave: () => void }[] = [];
        for (const [at, bytes] of all.entries()) {
          void gate.enter(bytes).then((leave) => {
            entered.push(at);
            inside.push({ bytes, leave });
          });
        }
        await turn();
        while (inside.length > 0) {
          const sum = inside.reduce((total, { bytes }) => total + bytes, 0);
          assert.equal(gate.bytes, sum);
          assert.ok(sum <= limit || inside.length === 1, `${sum} bytes are inside`);
          inside.shift()?.leave();
          await turn();
        }
        assert.equal(gate.bytes, 0);
        assert.deepEqual(entered, [...all.keys()]);
      }),
    );
  });
});

describe('the budget of a connection', () => {
  const limits = new CallLimits(DEFAULT_LIMITS);
  const connection = (): AdmittedConnection => ({
    uid: 0,
    worker: {},
    calls: 0,
    loads: 0,
    open: 0,
    messageBytes: 0,
    saves: limits.newBucket(),
    received: () => 0,
    close: () => undefined,
  });
  const { burst, perSecond } = DEFAULT_LIMITS.saveBytes;

  it('is asked for only while others save too', () => {
    const [alone, other] = [connection(), connection()];
    assert.equal(limits.admitMessage(alone, 4 * burst), 0);
    limits.admitMessage(other, 10);
    assert.equal(limits.admitMessage(alone, burst / 2), 0, 'what was taken alone is not owed');
    limits.admitMessage(other, 10);
    const pause = limits.admitMessage(alone, burst);
    assert.ok(pause > 0 && pause <= (1000 * burst) / perSecond, `${pause} ms`);
    assert.equal(limits.admitMessage(other, 10), 0, 'the other one owes nothing');
  });

  it('is used up by small messages too', () => {
    const [small, other] = [connection(), connection()];
    limits.admitMessage(other, 10);
    let paid = 0;
    while (limits.admitMessage(small, 1) === 0 && paid < 10_000) paid++;
    assert.ok(paid > 0 && paid < 10_000, `${paid} messages`);
  });

  it('a bucket gives what it has, then what comes in', () => {
    const bucket = new Bucket({ burst: 2, perSecond: 0.001 });
    assert.deepEqual([bucket.take(), bucket.take(), bucket.take()], [true, true, false]);
  });
});
