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
});
