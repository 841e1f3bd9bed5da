import { MigrationCrashRig, sayFault } from '../support/migration-crash-rig.js';
import { sampleFaults } from '../support/migration-matrix.js';

/** The whole matrix is in the long tests. */
const SAMPLES = 10;

describe('I-3 I-4 a failure in the middle of a migration', () => {
  let rig: MigrationCrashRig;

  before(async () => {
    rig = await MigrationCrashRig.create();
  });

  after(async () => {
    await rig?.destroy();
  });

  for (const fault of sampleFaults(SAMPLES)) {
    it(`leaves one live copy and everything acknowledged: ${sayFault(fault)}`, () => rig.endure(fault));
  }

  it('is in an audit log that is whole', () => rig.finish());
});
