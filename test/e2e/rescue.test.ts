import assert from 'node:assert/strict';
import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { type Host, TwoHosts } from '../support/two-hosts.js';
import { until } from '../support/until.js';

describe('a vTPM whose host is dead', function () {
  this.timeout(300_000);
  let hosts: TwoHosts;
  /** Dies. */
  let a: Host;
  /** Rescues. */
  let b: Host;
  let secret: string;
  let backup: string;
  let id: string;

  beforeEach(async () => {
    hosts = await TwoHosts.create();
    ({ a, b } = hosts);
    const { directory } = b.installation;
    [secret, backup] = [join(directory, 'backup.key'), join(directory, 'a.backup')];
    await a.installation.vtpm('web1', '--autostart');
    id = String((await a.installation.ctlJson('show', 'web1')).id);
    await write('in-the-backup');
    const key = await b.installation.ctlJson('backup', 'keygen', '-o', secret);
    await a.installation.ctlJson('backup', '--to', String(key.public), '-o', backup);
    await write('lost-with-it');
  });
  afterEach(() => hosts.destroy());

  /** What its guest keeps. */
  async function write(text: string): Promise<void> {
    const file = join(a.installation.directory, 'nv');
    writeFileSync(file, text);
    const script = `tpm2_nvreadpublic 0x1500016 >/dev/null 2>&1 || tpm2_nvdefine -Q 0x1500016 -C o -s 13; tpm2_nvwrite -Q 0x1500016 -C o -i ${file}`;
    const done = await a.installation.ctl('exec', 'web1', '--', 'sh', '-c', script);
    assert.equal(done.code, 0, done.stderr);
  }

  async function die(): Promise<void> {
    await a.installation.killSupervisor();
    await a.installation.killManager();
  }

  async function rescue(...flags: string[]) {
    const fencing = join(b.installation.directory, 'web1.fencing');
    const fence = await b.installation.ctl(
      ...['migrate', 'fence', '--vtpm', id, '--host', 'a'],
      ...['--last-generation', '1000', '--method', 'its processes were killed'],
    );
    assert.equal(fence.code, 0, fence.stderr);
    writeFileSync(fencing, fence.stdout);
    return await b.installation.ctl(
      ...['migrate', 'rescue', 'web1', '--from-backup', backup, '--operator-key', secret],
      ...['--fencing', fencing, ...flags],
    );
  }

  const stateOf = async (host: Host) =>
    (await host.installation.ctlJson('show', 'web1')) as { state: string; movedTo: string; marks: string[] };

  const isEndedOnA = async (): Promise<boolean> => {
    const { state, movedTo } = await stateOf(a);
    return state === 'moved' && movedTo === 'b';
  };

  it('goes on from its backup, and is ended by the host itself when that is back', async () => {
    await die();
    const plan = await rescue();
    assert.equal(plan.code, 1);
    assert.match(plan.stdout, /nothing was changed; to do it add --accept-rollback/);
    const done = await rescue('--accept-rollback');
    assert.equal(done.code, 0, done.stderr);
    assert.deepEqual((await stateOf(b)).marks, ['rescued']);
    await b.installation.ctlJson('start', 'web1');
    const read = await b.installation.ctl('exec', 'web1', '--', 'tpm2_nvread', '0x1500016', '-C', 'o');
    assert.equal(read.stdout, 'in-the-backup', read.stderr);

    // It has web1 in its list, to be started with the supervisor, and asks before it lets it.
    await a.start();
    assert.ok(await isEndedOnA());
    const start = await a.installation.ctl('start', 'web1');
    assert.equal(start.code, 1);
    assert.match(start.stderr, /another host|moved/);
    const forgotten = await a.installation.ctl('delete', 'web1');
    assert.match(forgotten.stdout, /untouched: it lives on b/, forgotten.stderr);
    const again = await rescue('--accept-rollback');
    assert.equal(again.code, 1);
    assert.match(again.stderr, /lives-here/);
    assert.match(a.installation.logs(), /rescued by another host while this one was away/);
  });

  it('is ended under its guest where the host came back without its network', async () => {
    await die();
    const done = await rescue('--accept-rollback');
    assert.equal(done.code, 0, done.stderr);
    await hosts.network.cut();
    await a.start();
    // What nobody can notice: it could run at two places now.
    await a.installation.ctlJson('start', 'web1');
    assert.equal((await stateOf(a)).state, 'running');
    await hosts.network.heal();
    await until('the host that was dead knows', isEndedOnA);
    assert.match(a.installation.logs(), /these peers did not say/);
  });
});
