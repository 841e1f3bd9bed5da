import assert from 'node:assert/strict';
import { crashPoints, MANAGER_BARRIERS } from '../support/crash-points.js';
import { ManagerCrashRig } from '../support/manager-crash-rig.js';

/** A store grows with its crashes: several installations after each other, two at once. */
const INSTALLATIONS = 12;
const CRASHES = 90;

describe('I-4 I-5 a thousand crashes of a manager, over all its steps', () => {
  const reached = new Map<string, number>();
  let crashes = 0;

  for (let installation = 0; installation < INSTALLATIONS; installation += 2) {
    it(`lose nothing: installations ${installation + 1} and ${installation + 2}`, async () => {
      await Promise.all([0, 1].map(() => crashOne()));
    });
  }

  it('were at least a thousand, and each step was interrupted at least ten times', () => {
    assert.ok(crashes >= 1000, `${crashes}`);
    const rare = MANAGER_BARRIERS.filter((name) => (reached.get(name) ?? 0) < 10);
    assert.deepEqual(rare, []);
  });

  async function crashOne(): Promise<void> {
    const rig = await ManagerCrashRig.create();
    try {
      for (
        let points = crashPoints().flat();
        rig.crashes < CRASHES;
        points = points.length > 0 ? points : crashPoints().flat()
      ) {
        const point = points.shift();
        if (point) await rig.crash(point);
      }
      await rig.finish();
    } finally {
      await rig.destroy();
    }
    crashes += rig.crashes;
    for (const [name, count] of rig.reached) reached.set(name, (reached.get(name) ?? 0) + count);
  }
});
