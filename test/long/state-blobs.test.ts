import assert from 'node:assert/strict';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { endingsIn, endsAnywhere } from '../support/checkpoint-rig.js';
import { buildFaultyWorker, killAt } from '../support/faulty-worker.js';
import { Installation } from '../support/installation.js';
import { controlOf, NO_PCR, SwtpmIoctl, seenBy, useTpm, withGuest } from '../support/swtpm-ioctl.js';
import { until } from '../support/until.js';

/** Every point of a taking-out or a bringing-in at which something else is known outside of the worker. */
const WORKER_BARRIERS = [
  'control-before-act',
  'before-suspend',
  'after-suspend',
  'before-start-save',
  'after-start-save',
  'control-after-act',
  'step-saved',
  'half-checkpoint',
  'control-before-answer',
  'before-pipe',
  'after-pipe',
  'before-consume',
  'after-consume',
  'after-send',
];
const MANAGER_BARRIERS = ['state-use.audited', 'manager-before-commit', 'manager-after-commit'];
/** By then it is not chance any more. */
const MOST_ROUNDS = 100;

describe('state blobs, with kill -9', function () {
  this.timeout(900_000);
  let installation: Installation;
  let vmm: SwtpmIoctl;
  let directory: string;
  beforeEach(async () => {
    directory = mkdtempSync(join(tmpdir(), 'vtpm-faults-'));
    vmm = new SwtpmIoctl();
    installation = await Installation.create({ tpm: 'embedded' });
  });
  afterEach(async () => {
    await installation?.destroy();
    vmm.close();
    rmSync(directory, { recursive: true, force: true });
  });

  /** The next time around begins as the first did. */
  async function forget(control: string, door: string, used: string): Promise<void> {
    await vmm.do(control, '--stop');
    assert.notEqual(
      (await vmm.tryTo(control, '--load', 'permanent', used)).code,
      0,
      'a reference works once',
    );
    await vmm.cycle(control);
    await withGuest(door, async (guest) => {
      assert.equal(await guest.pcr(16), NO_PCR);
      await guest.extend(16, 'measured');
    });
  }

  it('of workers at any step of any request: each request is done once, nothing is lost, a reference works once', async () => {
    await installation.startManager();
    const manifest = await buildFaultyWorker(directory, endsAnywhere(WORKER_BARRIERS, 3));
    await installation.startSupervisor({
      args: ['--restart-burst', '1000000', '--worker-manifest', manifest],
    });
    await installation.ctlJson('create', 'web1', '--startup', 'clear', '--doors', 'control,tpm');
    await until('the vTPM runs', async () => (await installation.ctl('start', 'web1')).code === 0);
    const control = controlOf(installation, 'web1');
    const door = installation.door('web1');
    await vmm.do(control, '-i');
    await useTpm(door);
    const before = await seenBy(door);
    const missing = () => WORKER_BARRIERS.filter((barrier) => !endingsIn(installation).has(barrier));
    for (let round = 0; missing().length > 0; round++) {
      assert.ok(round < MOST_ROUNDS, `no worker ended at ${missing().join(', ')}`);
      const files = await vmm.save(control, `round-${round}`);
      await vmm.load(control, files);
      assert.deepEqual(await seenBy(door), before, `round ${round}`);
      await forget(control, door, files.permanent);
    }
  });

  it('of the manager at any step of each save: the same', async () => {
    await installation.start();
    const door = await installation.vtpm('web1', '--startup', 'clear', '--doors', 'control,tpm');
    const control = controlOf(installation, 'web1');
    await vmm.do(control, '-i');
    await useTpm(door);
    const before = await seenBy(door);
    for (const barrier of MANAGER_BARRIERS) {
      const files = vmm.files(barrier);
      const dyingIn = async (step: () => Promise<void>): Promise<void> => {
        await installation.killManager();
        const prelude = `data:text/javascript,${encodeURIComponent(killAt(barrier, 1))}`;
        await installation.startManager({ nodeArgs: ['--import', prelude] });
        const stepped = step();
        const { manager } = installation;
        await until('the manager is dead', () => manager?.signalCode === 'SIGKILL');
        await installation.startManager();
        await stepped;
      };
      const [permanent, volatile] = vmm.takingOut(control, files);
      const [stop, first, second, init] = vmm.bringingIn(control, files);
      assert.ok(permanent && volatile && stop && first && second && init);
      await dyingIn(permanent);
      for (const step of [volatile, stop, first, second]) await step();
      await dyingIn(init);
      assert.deepEqual(await seenBy(door), before, barrier);
      await forget(control, door, files.permanent);
    }
  });
});
