import assert from 'node:assert/strict';
import { crashPoints, MANAGER_BARRIERS } from '../support/crash-points.js';
import { ManagerCrashRig } from '../support/manager-crash-rig.js';

/** A sample of the thousand crashes of the long run: each barrier, and random moments, shared by two managers. */
describe('I-4 I-5 a manager that is killed anywhere', function () {
  this.timeout(300_000);

  it('starts again with everything it has acknowledged, nothing half there and no number used twice', async () => {
    const rigs = await Promise.all([ManagerCrashRig.create(), ManagerCrashRig.create()]);
    try {
      const points = crashPoints();
      await Promise.all(
        rigs.map(async (rig) => {
          for (let group = points.pop(); group; group = points.pop()) {
            for (const point of group) await rig.crash(point);
          }
          await rig.finish();
        }),
      );
      const missed = MANAGER_BARRIERS.filter((name) => !rigs.some(({ reached }) => reached.has(name)));
      assert.deepEqual(missed, [], 'every step was interrupted');
    } finally {
      for (const rig of rigs) await rig.destroy();
    }
  });
});
