import assert from 'node:assert/strict';
import { type BlobMode, ControlRig } from '../support/control-rig.js';
import { ExactVmm } from '../support/exact-vmm.js';

const KILLS = 10;

/** A sample of the long run. */
describe('I-4 kill -9 of a worker is nothing to its VMM but a delay', () => {
  let rig: ControlRig | undefined;
  afterEach(async () => {
    await rig?.destroy();
    rig = undefined;
  });

  for (const mode of ['reference', 'plain'] satisfies BlobMode[]) {
    it(`at any point of any control command (state blobs: ${mode})`, async () => {
      rig = await ControlRig.create(mode);
      const vmm = new ExactVmm(rig);
      // The control: nobody is killed.
      await rig.while(vmm.round());
      assert.equal(rig.kills, 0);
      while (rig.kills < KILLS) {
        await rig.killNow();
        await rig.while(vmm.round());
      }
    });
  }
});
