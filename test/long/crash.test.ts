import { randomInt } from 'node:crypto';
import { CrashRig, type Victim } from '../support/crash-rig.js';
import { WORKER_BARRIERS } from '../support/faulty-worker.js';

const TOGETHER: Victim[][] = [
  ['worker'],
  ['manager'],
  ['supervisor'],
  ['worker', 'manager'],
  ['worker', 'supervisor'],
  ['manager', 'supervisor'],
  ['worker', 'manager', 'supervisor'],
];

describe('I-4 fifty crashes, at barriers and at random', () => {
  let rig: CrashRig;
  before(async () => {
    rig = await CrashRig.create();
  });
  after(() => rig?.destroy());

  for (let round = 0; round < 3; round++) {
    for (const barrier of WORKER_BARRIERS) {
      const count = randomInt(12, 80);
      it(`worker, ${barrier}, time ${count}`, () => rig.killWorkerAt(barrier, count));
    }
    for (const barrier of ['manager-before-commit', 'manager-after-commit']) {
      const count = randomInt(2, 40);
      it(`manager, ${barrier}, time ${count}`, () => rig.killManagerAt(barrier, count));
    }
  }
  for (let crash = 0; crash < 32; crash++) {
    const victims = TOGETHER[crash % TOGETHER.length]!;
    const steps = BigInt(randomInt(0, 60));
    it(`${victims.join(' + ')} after ${steps} steps`, () => rig.killAll(victims, steps));
  }
});
