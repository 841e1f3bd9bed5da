import assert from 'node:assert/strict';
import { DeadHost } from '../support/dead-host.js';
import { until } from '../support/until.js';

describe('a host that comes back without its network, and a vTPM of it was rescued', function () {
  this.timeout(300_000);
  let world: DeadHost;
  before(async () => {
    world = await DeadHost.create();
  });
  after(() => world?.hosts.destroy());

  it('runs it, which nobody can notice, until the two hosts are in contact', async () => {
    const { a, hosts } = world;
    await world.die();
    const done = await world.rescue('--accept-rollback');
    assert.equal(done.code, 0, done.stderr);
    await hosts.network.cut();
    await a.start();
    await a.installation.ctlJson('start', 'web1');
    assert.equal((await world.stateOn(a)).state, 'running');
    await hosts.network.heal();
    await until('the host that was dead knows', () => world.isGivenUp());
    assert.match(a.installation.logs(), /these peers did not say/);
  });
});
