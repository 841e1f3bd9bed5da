import assert from 'node:assert/strict';
import { setTimeout as delay } from 'node:timers/promises';
import { connectGuest } from 'vtpm-quickstart/guest';
import { Installation } from '../support/installation.js';
import { GuestLoad, type Tally } from '../support/load.js';
import { storeProcesses } from '../support/store-processes.js';
import { until } from '../support/until.js';

const NAMES = ['web1', 'web2'];
/** Longer than every time for which a worker holds a command of its own accord. */
const STOPPED_MS = 5_000;

describe('I-8 the store does not answer for seconds, as a disk that hangs', function () {
  this.timeout(120_000);
  let installation: Installation;
  before(async () => {
    installation = await Installation.create();
    await installation.start();
  });
  after(() => installation?.destroy());

  it('guests are held, none in failure mode, nothing is lost, and all goes on by itself', async () => {
    const tallies: Tally[] = [];
    const facts: { pid: number; identity: string; pcr: string }[] = [];
    for (const name of NAMES) {
      const guest = await connectGuest(await installation.vtpm(name));
      await guest.defineCounter();
      await guest.extend(16, name);
      const start = await guest.counter();
      tallies.push({ attempted: start, acknowledged: start, seen: start });
      facts.push({
        pid: await installation.workerPid(name),
        identity: await guest.endorsement(),
        pcr: await guest.pcr(16),
      });
      await guest.close();
    }
    const loads = await Promise.all(
      NAMES.map((name, at) => GuestLoad.begin(installation.door(name), tallies[at]!)),
    );
    const goOn = async (): Promise<void> => {
      const wanted = tallies.map(({ acknowledged }) => acknowledged + 5n);
      await until('both guests go on', () =>
        tallies.every(({ acknowledged }, at) => acknowledged >= wanted[at]!),
      );
    };
    await goOn();

    const pids = storeProcesses(installation.paths.manager.store);
    assert.ok(pids.length > 0);
    const before = tallies.map(({ acknowledged }) => acknowledged);
    for (const pid of pids) process.kill(pid, 'SIGSTOP');
    try {
      await delay(STOPPED_MS);
      for (const [at, { acknowledged }] of tallies.entries()) {
        // One answer may have been on its way.
        assert.ok(acknowledged <= before[at]! + 1n, 'nothing is acknowledged that is not durable');
      }
      const { body } = await installation.admin('GET', '/health');
      assert.equal(body.status, 'ready', 'the manager itself answers');
    } finally {
      for (const pid of pids) process.kill(pid, 'SIGCONT');
    }
    await goOn();
    for (const load of loads) await load.stop();
    for (const [at, name] of NAMES.entries()) {
      const guest = await connectGuest(installation.door(name));
      const { acknowledged, attempted, seen } = tallies[at]!;
      const counter = await guest.counter();
      assert.ok(acknowledged <= counter && seen <= counter && counter <= attempted, `${name}: ${counter}`);
      const { pid, identity, pcr } = facts[at]!;
      assert.equal(await installation.workerPid(name), pid, 'the same worker');
      assert.equal(await guest.endorsement(), identity);
      assert.equal(await guest.pcr(16), pcr, 'no reset');
      await guest.close();
    }
  });
});
