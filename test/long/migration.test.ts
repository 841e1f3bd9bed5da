import assert from 'node:assert/strict';
import { MovingVtpm } from '../support/moving-vtpm.js';
import { TwoHosts } from '../support/two-hosts.js';

const MOVES = 1000;
/** Of those, every so many is of a vTPM that is stopped. */
const OFFLINE_EVERY = 50;

describe('I-3 I-4 I-5 a thousand moves between two hosts', () => {
  it('under load: nothing is lost, nothing done twice, and no reset is seen', async () => {
    const hosts = await TwoHosts.create();
    const vtpm = await MovingVtpm.create(hosts, 'web1');
    try {
      vtpm.load();
      for (let move = 1; move <= MOVES; move++) {
        if (move % OFFLINE_EVERY === 0) await vtpm.moveOffline();
        else await vtpm.move();
      }
      await vtpm.pause();
      assert.equal(vtpm.host, hosts.a);
      for (const { installation } of [hosts.a, hosts.b]) {
        const { code, stdout, stderr } = await installation.ctl('audit', 'verify');
        assert.equal(code, 0, stdout + stderr);
      }
    } finally {
      await vtpm.destroy();
      await hosts.destroy();
    }
  });
});
