import { PowerLossRig } from '../support/power-loss-rig.js';

/** A sample of the images of the long run. */
describe('I-4 I-5 a manager whose host loses power', function () {
  this.timeout(300_000);

  it('starts with everything it has acknowledged, whatever the disk kept of what was not synced', async () => {
    const rig = await PowerLossRig.record(2);
    try {
      await rig.cutPower(12);
    } finally {
      await rig.destroy();
    }
  });
});
