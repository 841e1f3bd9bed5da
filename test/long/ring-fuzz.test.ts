import assert from 'node:assert/strict';
import { readdirSync } from 'node:fs';
import fc from 'fast-check';
import { RingClient } from 'vtpm-frontend-driver';
import { privateMiB } from '../bench/process-figures.js';
import { MiniManager } from '../support/mini-manager.js';
import { RingDoorway } from '../support/ring-doorway.js';
import { FuzzedRing, pageChanges, sendSetup, setups } from '../support/ring-fuzz.js';
import { getRandom, responseCode } from '../support/tpm-commands.js';
import { until } from '../support/until.js';
import { KeptRun, WorkerProcess } from '../support/worker-process.js';

const MESSAGES = 100_000;
const WARM_UP = 20_000;
const MOST_GROWTH_MIB = 8;

describe('a hundred thousand messages of hostile frontends at a ring door (test:long)', () => {
  it('I-10: harm nobody: the worker answers, keeps no descriptor and no memory', async function () {
    this.timeout(1_800_000);
    const run = new KeptRun();
    const manager = new MiniManager();
    const worker = await new WorkerProcess(manager).begin(run);
    const doorway = await RingDoorway.open(run);
    doorway.leadTo(worker);
    const descriptors = () => readdirSync(`/proc/${worker.child.pid}/fd`).length;
    const honest = await RingClient.connect(doorway.path);
    const before = descriptors();
    let count = 0;
    let warm = 0;
    const round = fc.asyncProperty(pageChanges(100, 300), setups, async (changes, setup) => {
      const ring = await FuzzedRing.open(doorway.path);
      for (const one of changes) ring.change(one);
      await sendSetup(doorway.path, setup);
      assert.equal(responseCode(await honest.transmit(getRandom())), 0);
      ring.close();
      count += changes.length + 1;
    });
    while (count < MESSAGES) {
      await fc.assert(round, { numRuns: 100 });
      if (warm === 0 && count >= WARM_UP) warm = privateMiB(worker.child.pid!);
    }
    await until('nothing is left open', () => descriptors() <= before);
    const growth = privateMiB(worker.child.pid!) - warm;
    assert.ok(growth <= MOST_GROWTH_MIB, `${growth} MiB more than after ${WARM_UP} messages`);
    await honest.close();
    await worker.kill();
    await doorway.close();
    manager.stop();
    run.close();
  });
});
