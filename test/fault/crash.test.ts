import { CrashRig, type Victim } from '../support/crash-rig.js';
import { WORKER_BARRIERS } from '../support/faulty-worker.js';

/** A sample of the fifty crashes of the long run. */
describe('I-4 an acknowledged save survives kill -9, an unacknowledged one was never visible', () => {
  let rig: CrashRig;
  before(async () => {
    rig = await CrashRig.create();
  });
  after(() => rig?.destroy());

  for (const victims of [
    ['worker'],
    ['manager'],
    ['supervisor'],
    ['worker', 'manager', 'supervisor'],
  ] as Victim[][]) {
    it(`of ${victims.join(', ')} at once`, () => rig.killAll(victims, 20n));
  }
  for (const barrier of WORKER_BARRIERS) {
    it(`of the worker, ${barrier}`, () => rig.killWorkerAt(barrier, 25));
  }
  for (const barrier of ['manager-before-commit', 'manager-after-commit']) {
    it(`of the manager, ${barrier}: the guest sees a pause`, () => rig.killManagerAt(barrier, 20));
  }
});
