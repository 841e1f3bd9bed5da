import assert from 'node:assert/strict';
import { liveInACrowd } from '../support/crowd.js';
import { Installation } from '../support/installation.js';

describe('500 vTPMs on a host', () => {
  let installation: Installation;
  before(async () => {
    installation = await Installation.create();
    await installation.start();
  });
  after(() => installation?.destroy());

  it('answer, are listed, fit into 8 GiB, and leave nothing behind when they are stopped', async () => {
    const { totalMiB } = await liveInACrowd(installation, 500);
    assert.ok(totalMiB <= 8192, `${totalMiB.toFixed(0)} MiB`);
  });
});
