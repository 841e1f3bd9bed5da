import { PowerLossRig } from '../support/power-loss-rig.js';

const RECORDINGS = 4;
const IMAGES = 120;

describe('I-4 I-5 480 losses of power', () => {
  for (let recording = 0; recording < RECORDINGS; recording += 2) {
    it(`lose nothing that was acknowledged: recordings ${recording + 1} and ${recording + 2}`, async () => {
      await Promise.all([0, 1].map(() => loseOften()));
    });
  }

  async function loseOften(): Promise<void> {
    const rig = await PowerLossRig.record(4);
    try {
      await rig.cutPower(IMAGES);
    } finally {
      await rig.destroy();
    }
  }
});
