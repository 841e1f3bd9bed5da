import assert from 'node:assert/strict';
import { CHECKPOINT_BARRIERS, CheckpointRig, RING_BARRIERS } from '../support/checkpoint-rig.js';

describe('five hundred kills of a worker are delays for its guest and nothing else', function () {
  this.timeout(1_800_000);
  let rig: CheckpointRig | undefined;
  afterEach(async () => {
    await rig?.destroy();
    rig = undefined;
  });

  it('three hundred, at every point where its neighbours know something that it does not', async () => {
    rig = await CheckpointRig.create(CHECKPOINT_BARRIERS, 60);
    const { endings } = rig;
    await rig.runUntil(() => sum(endings()) >= 300, 1_700_000);
    for (const name of CHECKPOINT_BARRIERS) assert.ok(endings().has(name), `never at ${name}`);
  });

  it('two hundred more at every such point of a ring', async () => {
    rig = await CheckpointRig.create(RING_BARRIERS, 60, 'ring');
    const { endings } = rig;
    await rig.runUntil(() => sum(endings()) >= 200, 1_700_000);
    for (const name of RING_BARRIERS) assert.ok(endings().has(name), `never at ${name}`);
  });

  it('two hundred, at any moment', async () => {
    rig = await CheckpointRig.create();
    await rig.killAtRandom(200, 120);
    assert.equal(rig.kills, 200);
  });
});

function sum(counts: ReadonlyMap<string, number>): number {
  return [...counts.values()].reduce((total, count) => total + count, 0);
}
