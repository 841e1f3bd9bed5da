import assert from 'node:assert/strict';
import { MigrationCrashRig, type MigrationFault } from '../support/migration-crash-rig.js';
import { doubleFaults, points, singleFaults } from '../support/migration-matrix.js';

/** Pairs of hosts at work at once. */
const SIDE_BY_SIDE = 2;
/** A pair of hosts grows with its faults: so many each. */
const FAULTS_EACH = 60;
const DOUBLE = 150;

describe('I-3 I-4 whatever fails at whatever step of a migration', () => {
  const reached = new Map<string, number>();

  for (const [name, faults] of [
    ['one thing', singleFaults()],
    ['two things', doubleFaults(DOUBLE)],
  ] as const) {
    it(`${name}: one host can run it, or none until the operator asks, and nothing is lost`, async () => {
      const batches: MigrationFault[][] = [];
      for (let from = 0; from < faults.length; from += FAULTS_EACH) {
        batches.push(faults.slice(from, from + FAULTS_EACH));
      }
      const next = async (): Promise<void> => {
        for (let batch = batches.shift(); batch; batch = batches.shift()) await endure(batch);
      };
      await Promise.all(Array.from({ length: SIDE_BY_SIDE }, next));
    });
  }

  it('at every step of both sides', () => {
    const never = points().filter(({ barrier }) => !reached.has(barrier));
    assert.deepEqual(never, []);
  });

  async function endure(faults: readonly MigrationFault[]): Promise<void> {
    const rig = await MigrationCrashRig.create();
    try {
      for (const fault of faults) await rig.endure(fault);
      await rig.finish();
    } finally {
      await rig.destroy();
    }
    for (const [name, count] of rig.reached) reached.set(name, (reached.get(name) ?? 0) + count);
  }
});
