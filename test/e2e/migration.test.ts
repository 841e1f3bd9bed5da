import assert from 'node:assert/strict';
import { MovingVtpm } from '../support/moving-vtpm.js';
import { TwoHosts } from '../support/two-hosts.js';

const MOVES = 20;
/** Of those, every so many is of a vTPM that is stopped. */
const OFFLINE_EVERY = 7;

describe('I-3 I-4 I-5 a vTPM that goes back and forth between two hosts', () => {
  let hosts: TwoHosts;
  let vtpm: MovingVtpm;

  before(async () => {
    hosts = await TwoHosts.strangers();
    const { a, b } = hosts;
    await a.know(b);
    // So every way back is over IPv6, where there is one.
    await b.know(a, a.address(a.place.v6 ? 'v6' : 'v4'));
    vtpm = await MovingVtpm.create(hosts, 'web1');
  });

  after(async () => {
    await vtpm?.destroy();
    await hosts?.destroy();
  });

  it(`${MOVES} times, most of them under load: nothing is lost, nothing done twice, and no reset is seen`, async () => {
    vtpm.load();
    for (let move = 1; move <= MOVES; move++) {
      if (move % OFFLINE_EVERY === 0) await vtpm.moveOffline();
      else await vtpm.move();
    }
    await vtpm.pause();
    assert.equal(vtpm.host, hosts.a);
  });

  it('by the command of an operator, who sees time, downtime and bytes at the end', async () => {
    const { code, stdout, stderr } = await vtpm.host.installation.ctl('migrate', 'web1', '--to', 'b');
    assert.equal(code, 0, stderr);
    assert.match(stdout, /^web1 lives on b now: in .* stopped for .* ms, .*KiB$/m);
    vtpm.host = hosts.b;
    await vtpm.check();
  });

  it('is at the other host, for whoever asks the one it left', async () => {
    const { body } = await hosts.a.installation.admin('GET', `/vtpms/${vtpm.id}`);
    assert.deepEqual([body.kind, body.movedTo], ['moved', 'b']);
    const started = await hosts.a.installation.supervisord('POST', '/vtpms/web1/start');
    assert.ok(started.status >= 400, 'a vTPM that has moved is not started');
  });
});
