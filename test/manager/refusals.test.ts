import assert from 'node:assert/strict';
import { ManagerError } from 'vtpm-manager';
import { type AuditEvent, EMPTY_HEAD, Refusals } from 'vtpm-manager/audit/index';

const ID = (n: number) => `00000000-0000-4000-8000-${String(n).padStart(12, '0')}`;

describe('refusals in the audit log', () => {
  const written: AuditEvent[] = [];
  let isFull = false;
  const refusals = () =>
    new Refusals({
      append: async (event) => {
        if (isFull) throw new ManagerError('store-full', 'no room');
        written.push(event);
        return EMPTY_HEAD;
      },
    });
  const refused = (n: number, code: string): AuditEvent => ({
    actor: { worker: '00' },
    action: 'load',
    verdict: 'refused',
    vtpm: ID(n),
    reason: { code, message: 'm' },
  });
  beforeEach(() => {
    written.length = 0;
    isFull = false;
  });

  it('I-10: are one entry at once and one for all that repeat it', async () => {
    const log = refusals();
    for (let i = 0; i < 10_000; i++) await log.note(refused(1, 'stale-epoch'));
    await log.note(refused(1, 'wrong-vm'));
    await log.note(refused(2, 'stale-epoch'));
    assert.equal(written.length, 3);
    await log.flush();
    assert.deepEqual([written.length, written[3]?.facts], [4, { times: '9999' }]);
    await log.flush();
    await log.note(refused(1, 'stale-epoch'));
    assert.equal(written.length, 5);
    await log.close();
    assert.equal(written.length, 5);
  });

  it('I-10: of however many vTPMs take no more than some entries and memory', async () => {
    const log = refusals();
    for (let i = 0; i < 5_000; i++) await log.note(refused(i, 'stale-epoch'));
    assert.equal(written.length, 256);
    await log.close();
    assert.deepEqual([written.length, written[256]?.reason?.code], [257, 'others']);
    assert.equal(written[256]?.facts?.times, String(5_000 - 256));
  });

  it('are counted while they cannot be written, and written when they can', async () => {
    const log = refusals();
    isFull = true;
    await log.note(refused(1, 'stale-epoch'));
    await log.note(refused(1, 'stale-epoch'));
    await log.flush();
    isFull = false;
    await log.close();
    assert.deepEqual([written.length, written[0]?.facts], [1, { times: '2' }]);
  });
});
