import assert from 'node:assert/strict';
import { createConnection } from 'node:net';
import { CHECKPOINT_BARRIERS, CheckpointRig, RING_BARRIERS } from '../support/checkpoint-rig.js';
import { emptyCheckpoints } from '../support/empty-checkpoints.js';
import { TpmClient } from '../support/tpm-client.js';
import { getRandom } from '../support/tpm-commands.js';
import { until } from '../support/until.js';

const startup = (): Buffer => Buffer.from('80010000000c000001440000', 'hex');

/** A sample of the five hundred kills of the long run. */
describe('kill -9 of a worker is a delay for its guest and nothing else', () => {
  let rig: CheckpointRig | undefined;
  afterEach(async () => {
    await rig?.destroy();
    rig = undefined;
  });

  it('at every point where its neighbours know something that it does not', async () => {
    rig = await CheckpointRig.create(CHECKPOINT_BARRIERS, 25);
    const { endings } = rig;
    await rig.runUntil(() => CHECKPOINT_BARRIERS.every((name) => endings().has(name)), 55_000);
  });

  it('at every such point of a ring', async () => {
    rig = await CheckpointRig.create(RING_BARRIERS, 25, 'ring');
    const { endings } = rig;
    await rig.runUntil(() => RING_BARRIERS.every((name) => endings().has(name)), 55_000);
  });

  it('with an emptied memory it is a TPM failure until the VM is reset, whatever the guest does', async () => {
    rig = await CheckpointRig.create();
    const { installation } = rig;
    const state = async () => (await installation.supervisord('GET', '/vtpms/web1')).body;
    const before = await state();
    emptyCheckpoints(installation.supervisor?.pid ?? 0);
    process.kill((before.worker as { pid: number }).pid, 'SIGKILL');
    await assert.rejects(rig.guest.round(), /TPM_RC_FAILURE/);
    await until('it is known to be lost', async () => (await state()).state === 'lost');
    assert.match(String((await state()).reason), /there is no checkpoint/);
    const client = new TpmClient(createConnection(installation.door('web1')));
    for (const command of [startup(), getRandom(), startup()]) {
      assert.equal((await client.transmit(command)).toString('hex'), '80010000000a00000101');
    }
    client.close();
    await installation.ctlJson('start', 'web1');
    const after = await state();
    assert.deepEqual([after.state, after.reason], ['running', null]);
    assert.notEqual(after.vmRunId, before.vmRunId);
  });

  for (const door of ['tpm', 'ring'] as const) {
    it(`at any moment, at the door ${door}`, async () => {
      rig = await CheckpointRig.create([], 0, door);
      await rig.killAtRandom(10, 60);
      assert.equal(rig.kills, 10);
    });
  }
});
