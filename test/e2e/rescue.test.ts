import assert from 'node:assert/strict';
import { DeadHost } from '../support/dead-host.js';

describe('a vTPM whose host is dead', function () {
  this.timeout(300_000);
  let world: DeadHost;
  before(async () => {
    world = await DeadHost.create();
  });
  after(() => world?.hosts.destroy());

  it('I-3 goes on from its backup, and is ended by the host itself when that is back', async () => {
    const { a, b } = world;
    await world.die();
    const plan = await world.rescue();
    assert.equal(plan.code, 1);
    assert.match(plan.stdout, /nothing was changed; to do it add --accept-rollback/);
    const done = await world.rescue('--accept-rollback');
    assert.equal(done.code, 0, done.stderr);
    assert.deepEqual((await world.stateOn(b)).marks, ['rescued']);
    await b.installation.ctlJson('start', 'web1');
    const read = await b.installation.ctl('exec', 'web1', '--', 'tpm2_nvread', '0x1500016', '-C', 'o');
    assert.equal(read.stdout, 'in-the-backup', read.stderr);

    // It has web1 in its list, and asks before it lets anybody run it.
    await a.start();
    assert.ok(await world.isGivenUp());
    const start = await a.installation.ctl('start', 'web1');
    assert.equal(start.code, 1);
    assert.match(start.stderr, /another host|moved/);
    const forgotten = await a.installation.ctl('delete', 'web1');
    assert.match(forgotten.stdout, /untouched: it lives on b/, forgotten.stderr);
    const again = await world.rescue('--accept-rollback');
    assert.equal(again.code, 1);
    assert.match(again.stderr, /lives-here/);
    assert.match(a.installation.logs(), /rescued by another host while this one was away/);
  });
});
