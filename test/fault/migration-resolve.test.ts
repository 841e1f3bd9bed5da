import assert from 'node:assert/strict';
import { migrate } from '../support/migrate.js';
import { MovingVtpm } from '../support/moving-vtpm.js';
import { TwoHosts } from '../support/two-hosts.js';
import { until } from '../support/until.js';

const NAME = 'web1';

describe('I-3 a migration whose destination does not come back for a while', () => {
  let hosts: TwoHosts;
  let vtpm: MovingVtpm;

  before(async () => {
    hosts = await TwoHosts.create();
    vtpm = await MovingVtpm.create(hosts, NAME);
  });

  after(async () => {
    await vtpm?.destroy();
    await hosts?.destroy();
  });

  for (const [barrier, verdict] of [
    ['migrate.destination.commit', 'aborted'],
    ['migrate.destination.committed', 'committed'],
  ] as const) {
    it(`runs nowhere, and no command makes it, until that host says that it is ${verdict}`, async () => {
      const source = vtpm.host;
      const destination = hosts.other(source);
      vtpm.load();
      destination.manager.stopAt(barrier, 'die');
      const migration = migrate(source, destination, NAME);
      await destination.manager.reached(barrier);
      await until('it is in doubt', async () => (await stateOf(source)) === 'in-doubt');
      for (const { installation } of [source, destination]) {
        const { status } = await installation.supervisord('POST', `/vtpms/${NAME}/start`);
        assert.ok(status >= 400, 'nobody starts it');
      }
      const early = await source.installation.ctl('migrate', 'resolve', NAME);
      assert.notEqual(early.code, 0, early.stdout);
      await destination.startManager();
      const resolved = await source.installation.ctl('migrate', 'resolve', NAME);
      const isSettledAlready = /no migration of web1 is in doubt/.test(resolved.stderr);
      assert.ok(resolved.code === 0 || isSettledAlready, resolved.stdout + resolved.stderr);
      await migration;
      await until(`it is ${verdict}`, async () => (await stateOf(source)) === verdict);
      vtpm.host = verdict === 'committed' ? destination : source;
      await vtpm.goOn(false);
      const { stdout } = await source.installation.ctl('--json', 'audit', 'tail', '-n', '50');
      assert.match(stdout, /migrate-resolve/);
    });
  }

  /** Of the newest one, as that host knows it. */
  async function stateOf({ installation }: { installation: typeof hosts.a.installation }): Promise<string> {
    const { body } = await installation.admin('GET', '/migrations');
    return (body.migrations as { state: string }[]).at(-1)?.state ?? 'none';
  }
});
