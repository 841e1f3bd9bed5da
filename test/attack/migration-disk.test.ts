import assert from 'node:assert/strict';
import { migrate } from '../support/migrate.js';
import { MovingVtpm } from '../support/moving-vtpm.js';
import { TwoHosts } from '../support/two-hosts.js';

describe('I-4 I-9 a destination whose disk is full', () => {
  let hosts: TwoHosts;
  let vtpm: MovingVtpm;

  before(async () => {
    hosts = await TwoHosts.create({ b: { homeDisk: '400m' } });
    vtpm = await MovingVtpm.create(hosts, 'web1');
    vtpm.load();
  });

  after(async () => {
    await vtpm?.destroy();
    await hosts?.destroy();
  });

  afterEach(async () => {
    hosts.b.manager.release();
    hosts.b.installation.disk?.clear();
    await vtpm.moreRounds();
  });

  /** @param barrier of its manager at which the disk becomes full @returns phase and reason */
  const endWithFull = async (barrier: string): Promise<string[]> => {
    hosts.b.manager.stopAt(barrier, 'wait');
    const migration = migrate(hosts.a, hosts.b, 'web1');
    await hosts.b.manager.reached(barrier);
    hosts.b.installation.disk?.fill(0);
    hosts.b.manager.release(barrier);
    const last = (await migration).at(-1);
    return [last?.phase ?? '', last?.reason ?? ''];
  };

  it('refuses by name before anything stops: store-full', async () => {
    hosts.b.installation.disk?.fill(0);
    const last = (await migrate(hosts.a, hosts.b, 'web1')).at(-1);
    assert.deepEqual([last?.phase, last?.reason, last?.downtimeUs], ['ABORTED', 'store-full', 0]);
  });

  it('refuses where it becomes so while a worker is made ready', async () => {
    assert.deepEqual(await endWithFull('migrate.destination.accepted'), ['ABORTED', 'store-full']);
  });

  it('decides against it where it becomes so with the state in its hands, and the guest goes on', async () => {
    const [phase] = await endWithFull('migrate.destination.commit');
    assert.equal(phase, 'ABORTED');
    await vtpm.moreRounds();
  });

  it('takes it when there is room again', async () => {
    await vtpm.move();
    await vtpm.pause();
  });
});
