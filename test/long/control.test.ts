import { type BlobMode, CONTROL_BARRIERS, ControlRig } from '../support/control-rig.js';
import { ExactVmm } from '../support/exact-vmm.js';

const KILLS = 150;

describe('I-4 hundreds of workers are killed under a VMM that notices everything', function () {
  this.timeout(20 * 60_000);
  let rig: ControlRig | undefined;
  afterEach(async () => {
    await rig?.destroy();
    rig = undefined;
  });

  for (const mode of ['reference', 'plain'] satisfies BlobMode[]) {
    it(`at every point of the control commands (state blobs: ${mode})`, async () => {
      rig = await ControlRig.create(mode, 12);
      const vmm = new ExactVmm(rig);
      const isEverywhere = (): boolean => CONTROL_BARRIERS[mode].every((name) => rig?.endings.has(name));
      while (rig.kills < KILLS || !isEverywhere()) {
        await rig.killNow();
        await rig.while(vmm.round());
      }
    });
  }
});
