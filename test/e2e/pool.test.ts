import assert from 'node:assert/strict';
import { connectGuest } from 'vtpm-quickstart/guest';
import { liveInACrowd } from '../support/crowd.js';
import { Installation } from '../support/installation.js';
import { until } from '../support/until.js';

const POOL = { env: { VTPM_POOL_MIN: '2', VTPM_POOL_MAX: '2' } };
/**
 * MiB of a worker that does nothing, with its sandbox and the kernel's page tables for it. Node.js above 20 holds three more of
 * its own.
 */
const IDLE_MIB = Number.parseInt(process.versions.node, 10) > 20 ? 18 : 14;

describe('workers that wait for a vTPM', function () {
  this.timeout(120_000);
  let installation: Installation;
  beforeEach(async () => {
    installation = await Installation.create();
  });
  afterEach(() => installation?.destroy());

  interface Shown {
    readonly worker: { readonly pid: number; readonly startedAt: string; readonly layers: string[] };
  }
  const shown = async (name: string) =>
    (await installation.supervisord('GET', `/vtpms/${name}`)).body as unknown as Shown;
  const filled = () =>
    until('the pool is full', async () => {
      const { pool } = (await installation.supervisord('GET', '/health')).body as { pool: { idle: number } };
      return pool.idle === 2;
    });
  /** @returns whether it was there before */
  async function start(name: string): Promise<boolean> {
    const before = Date.now();
    const { status, body } = await installation.supervisord('POST', `/vtpms/${name}/start`);
    assert.equal(status, 200, JSON.stringify(body));
    return Date.parse((await shown(name)).worker.startedAt) < before;
  }

  it('serve one each, that is nobody else and nothing that was rehearsed', async () => {
    await installation.startManager();
    await installation.startSupervisor(POOL);
    const endorsements: string[] = [];
    const counts: bigint[] = [];
    const layers: string[] = [];
    for (const name of ['a', 'b', 'c']) {
      await installation.ctlJson('create', name);
      await filled();
      assert.equal(await start(name), true, `${name} came from the pool`);
      const guest = await connectGuest(installation.door(name));
      endorsements.push(await guest.endorsement());
      await guest.defineCounter();
      await guest.increment();
      counts.push(await guest.counter());
      await guest.close();
      layers.push((await shown(name)).worker.layers.join());
    }
    assert.equal(new Set(endorsements).size, 3, 'three TPMs');
    await installation.supervisord('POST', '/vtpms/a/stop');
    await filled();
    assert.equal(await start('a'), true, 'another worker, the same TPM');
    const guest = await connectGuest(installation.door('a'));
    assert.equal(await guest.endorsement(), endorsements[0]);
    assert.equal(await guest.counter(), counts[0]);
    await guest.close();
    await installation.supervisord('POST', '/vtpms/a/stop');
    await installation.killSupervisor();
    await installation.startSupervisor();
    assert.equal(await start('a'), false, 'without a pool');
    assert.deepEqual(new Set(layers), new Set([(await shown('a')).worker.layers.join()]), 'locked in alike');
  });

  it('get a new link to a manager that was killed, and serve with it', async () => {
    await installation.startManager();
    await installation.startSupervisor(POOL);
    await filled();
    await installation.ctlJson('create', 'a');
    await installation.killManager();
    await until('their links are lost', async () => {
      const { pool } = (await installation.supervisord('GET', '/health')).body as { pool: { idle: number } };
      return pool.idle === 0;
    });
    await installation.startManager();
    await filled();
    assert.equal(await start('a'), true);
    const guest = await connectGuest(installation.door('a'));
    await guest.defineCounter();
    await guest.increment();
    await guest.close();
  });

  it('and a dozen that serve: each answers, costs little, and leaves nothing behind (500 in the long run)', async () => {
    await installation.start();
    const { eachMiB } = await liveInACrowd(installation, 12);
    assert.ok(eachMiB <= IDLE_MIB, `${eachMiB.toFixed(1)} MiB each`);
  });
});
