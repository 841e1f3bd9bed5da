import assert from 'node:assert/strict';
import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { migrate } from '../support/migrate.js';
import { MovingVtpm } from '../support/moving-vtpm.js';
import { TwoHosts } from '../support/two-hosts.js';

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

  it('runs nowhere, and no command makes it, until that host is asked what it decided', async () => {
    const [source, destination] = [hosts.a, hosts.b];
    vtpm.load();
    destination.manager.stopAt('migrate.destination.committed', 'die');
    const migration = migrate(source, destination, NAME);
    await destination.manager.reached('migrate.destination.committed');
    assert.equal((await migration).at(-1)?.phase, 'IN_DOUBT');
    for (const { installation } of [source, destination]) {
      const { status } = await installation.supervisord('POST', `/vtpms/${NAME}/start`);
      assert.ok(status >= 400, 'nobody starts it');
    }
    const early = await source.installation.ctl('migrate', 'resolve', NAME);
    assert.notEqual(early.code, 0, early.stdout);
    await destination.startManager();
    const resolved = await source.installation.ctl('migrate', 'resolve', NAME);
    // It asks by itself, too.
    const isKnownAlready = /no migration of web1 is in doubt/.test(resolved.stderr);
    assert.ok(resolved.code === 0 || isKnownAlready, resolved.stdout + resolved.stderr);
    vtpm.host = destination;
    await vtpm.goOn(false);
    const { stdout } = await source.installation.ctl('--json', 'audit', 'tail', '-n', '50');
    assert.match(stdout, /migrate-resolve/);
  });

  it('goes on where it was frozen, on the word that this host is gone for good, and is ended there when it is back', async () => {
    const [source, destination] = [hosts.b, hosts.a];
    vtpm.load();
    destination.manager.stopAt('migrate.destination.committed', 'die');
    const migration = migrate(source, destination, NAME);
    await destination.manager.reached('migrate.destination.committed');
    await destination.installation.killSupervisor();
    await source.installation.killManager();
    await source.startManager();
    assert.equal((await migration).at(-1)?.phase, 'IN_DOUBT');
    const file = join(source.installation.directory, 'fencing');
    const fence = await source.installation.ctl(
      ...['migrate', 'fence', '--vtpm', vtpm.id, '--host', destination.name],
      ...['--last-generation', '1000', '--method', 'its processes were killed'],
    );
    writeFileSync(file, fence.stdout);
    const resolved = await source.installation.ctl('migrate', 'resolve', NAME, '--fenced', file);
    assert.equal(resolved.code, 0, resolved.stdout + resolved.stderr);
    assert.match(resolved.stdout, /^web1: aborted; taken back without the word of the other host/);
    await vtpm.goOn(false);
    const { marks } = await source.installation.ctlJson('show', NAME);
    assert.deepEqual(marks, ['rescued']);
    vtpm.load();
    await destination.start();
    const { state, movedTo } = await destination.installation.ctlJson('show', NAME);
    assert.deepEqual([state, movedTo], ['moved', source.name]);
    await vtpm.moreRounds();
    await vtpm.pause();
    await vtpm.check();
  });
});
