import assert from 'node:assert/strict';
import { ManagerPair } from '../support/manager-pair.js';

describe('a migration between two managers', () => {
  let pair: ManagerPair;
  before(async () => {
    pair = await ManagerPair.create();
  });
  after(() => pair?.destroy());

  it('moves a stopped vTPM: state, generation and epoch go on at the destination alone', async () => {
    const { a, b } = pair;
    const worker = await a.manufactured('P-one');
    const { vtpm } = worker;
    await worker.end();
    const given = a.give(await a.order(vtpm, b));
    const incoming = await b.acceptNext();
    assert.equal(incoming.id, vtpm.id);
    const last = await given.carryOut();
    assert.equal(last?.phase, 'COMMITTED', `${last?.reason}: ${last?.message}`);
    const here = await b.worker(vtpm);
    assert.equal(Buffer.from(here.grant.permanent).toString(), 'P-one');
    assert.equal(here.grant.generation, 1n);
    await here.end();
  });

  it('moves a running vTPM: its worker is suspended, the one that waits at the destination goes on', async () => {
    const { a, b } = pair;
    const worker = await a.manufactured('P-live');
    const { vtpm } = worker;
    const given = a.give(await a.order(vtpm, b, { mode: 'LIVE' }));
    const incoming = await b.events.next('incoming');
    // The source's epoch is what the ticket of the one that waits expects.
    const waiting = b.worker(vtpm, ['RESUME'], BigInt(incoming.epoch as number));
    await b.call('POST', `/migrations/${String(incoming.migration)}/accept`, {});
    await worker.suspends('V-live');
    const last = await given.carryOut();
    assert.equal(last?.phase, 'COMMITTED', `${last?.reason}: ${last?.message}`);
    const here = await waiting;
    assert.equal(here.grant.arrived, true);
    assert.equal(Buffer.from(here.grant.permanent).toString(), 'P-suspended');
    assert.equal(Buffer.from(here.grant.suspended!.volatile).toString(), 'V-live');
    assert.equal(here.grant.epoch, 2n);
    await here.end();
  });
});
