import assert from 'node:assert/strict';
import { existsSync, mkdirSync, readFileSync, rmSync } from 'node:fs';
import { join } from 'node:path';
import { connectGuest } from 'vtpm-quickstart/guest';
import { killAt } from '../support/faulty-worker.js';
import { Installation, REPOSITORY, run } from '../support/installation.js';
import { GuestLoad, type Tally } from '../support/load.js';
import { SmallDisk } from '../support/small-disk.js';
import { until } from '../support/until.js';

const prelude = (barrier: string): string[] => [
  '--import',
  `data:text/javascript,${encodeURIComponent(killAt(barrier, 1))}`,
];

describe('vtpmctl backup, restore and rebuild', function () {
  this.timeout(180_000);
  let installation: Installation;
  let key: string;
  let to: string;
  let id: string;
  let identity: string;
  let files = 0;

  before(async () => {
    installation = await Installation.create();
    await installation.start();
    key = join(installation.directory, 'backup.key');
    to = String((await installation.ctlJson('backup', 'keygen', '-o', key)).public);
    const guest = await connectGuest(await installation.vtpm('web1'));
    await guest.defineCounter();
    identity = `${await guest.makeKey()} ${await guest.endorsement()}`;
    await guest.close();
    id = String((await installation.ctlJson('show', 'web1')).id);
  });
  after(() => installation.destroy());

  const name = (): string => join(installation.directory, `${++files}.vtpm`);

  async function backup(...names: string[]): Promise<string> {
    const file = name();
    await installation.ctlJson('backup', '--to', to, '-o', file, ...names);
    return file;
  }

  /** What the guest sees: the counter, after it has proved to be the same TPM. */
  async function counter(): Promise<bigint> {
    const guest = await connectGuest(installation.door('web1'));
    try {
      assert.equal(`${await guest.keyFingerprint()} ${await guest.endorsement()}`, identity);
      return await guest.counter();
    } finally {
      await guest.close();
    }
  }

  async function increment(): Promise<void> {
    const guest = await connectGuest(installation.door('web1'));
    await guest.increment();
    await guest.close();
  }

  /** A command of the manager's program that kills itself at a barrier. */
  function killed(barrier: string, ...args: string[]) {
    const program = join(REPOSITORY, 'manager/bin/vtpm-managerd.js');
    return run(process.execPath, [...prelude(barrier), program, ...args, '--home', installation.home]);
  }

  async function generation(): Promise<number> {
    return Number((await installation.admin('GET', `/vtpms/${id}`)).body.generation);
  }

  it('I-4 a backup made under load brings a lost disk back to a state that the guest had', async () => {
    const tally: Tally = { attempted: 0n, acknowledged: 0n, seen: await counter() };
    const begin = tally.seen;
    const load = await GuestLoad.begin(installation.door('web1'), tally);
    await until('the guest works', () => tally.acknowledged > 3n);
    const [least, file] = [tally.acknowledged, await backup()];
    const most = tally.attempted;
    await until('the guest goes on', () => tally.acknowledged > most + 3n);
    await load.stop();
    await installation.ctlJson('stop', 'web1');
    await installation.stopDaemons();
    rmSync(installation.home, { recursive: true });
    await installation.ctlJson('rebuild', file, '--key', key, '--accept-rollback');
    await installation.start();
    await installation.ctlJson('create', 'web1', '--adopt', id);
    await installation.ctlJson('start', 'web1');
    const value = (await counter()) - begin;
    assert.ok(least <= value && value <= most, `${value} of ${least} to ${most}`);
    assert.deepEqual((await installation.ctlJson('show', 'web1')).marks, ['restored']);
  });

  it('says what would go back, and takes it back with consent', async () => {
    await installation.ctlJson('stop', 'web1');
    await installation.ctlJson('start', 'web1');
    const value = await counter();
    const file = await backup('web1');
    await increment();
    await installation.ctlJson('stop', 'web1');
    const before = await generation();
    const plan = await installation.ctl('restore', file, '--key', key, 'web1');
    assert.equal(plan.code, 1);
    assert.match(
      plan.stdout,
      new RegExp(
        `goes back  ${id} is at generation ${before % 2 ** 32}, .*, the backup has \\d+, .* \\(saved \\d{4}-`,
      ),
    );
    assert.equal(await generation(), before);
    await installation.ctlJson('restore', file, '--key', key, '--accept-rollback', 'web1');
    assert.ok((await generation()) > before);
    await installation.ctlJson('start', 'web1');
    assert.equal(await counter(), value);
  });

  it('inspect shows a backup, a store at rest, and what is wrong with them, without a key', async () => {
    const file = await backup();
    const seen = await installation.ctlJson('inspect', file);
    assert.equal(seen.verdict, 'ok');
    const [vtpm] = seen.vtpms as { id: string; bytes: number }[];
    assert.equal(vtpm?.id, id);
    const running = await installation.ctl('inspect', installation.home);
    assert.match(running.stderr, /in use by another manager/);
    await installation.ctlJson('stop', 'web1');
    await installation.stopDaemons();
    const rest = await installation.ctlJson('inspect', installation.home);
    assert.equal(rest.verdict, 'ok');
    assert.equal((rest.facts as { anchor: string }).anchor, 'present');
    assert.deepEqual(
      (rest.vtpms as { id: string }[]).map((found) => found.id),
      [id],
    );
    await installation.start();
    await installation.ctlJson('start', 'web1');
  });

  it('kill -9 of the manager or of the command leaves no file that looks whole', async () => {
    for (const barrier of ['backup.begun', 'backup.entry']) {
      await installation.killManager();
      await installation.startManager({ nodeArgs: prelude(barrier) });
      const file = name();
      assert.notEqual((await installation.ctl('backup', '--to', to, '-o', file)).code, 0, barrier);
      assert.equal(existsSync(file), false, barrier);
      await until('the manager is dead', () => installation.manager?.signalCode === 'SIGKILL');
      await installation.startManager();
    }
    for (const barrier of ['backup.chunk', 'backup.verified']) {
      const file = name();
      await killed(barrier, 'backup', '--to', to, '--output', file);
      assert.equal(existsSync(file), false, barrier);
      assert.equal(existsSync(`${file}.partial`), true, barrier);
      await installation.ctlJson('backup', '--to', to, '-o', file);
      assert.equal((await installation.ctlJson('inspect', file)).verdict, 'ok');
    }
  });

  it('a disk that is full leaves no file', async () => {
    const path = join(installation.directory, 'full');
    mkdirSync(path);
    const disk = SmallDisk.mount(path, '1m');
    try {
      disk.fill(0);
      const refused = await installation.ctl('backup', '--to', to, '-o', join(path, 'b.vtpm'));
      assert.equal(refused.code, 1);
      assert.match(refused.stderr, /disk is full/);
      assert.equal(existsSync(join(path, 'b.vtpm')), false);
      assert.equal(existsSync(join(path, 'b.vtpm.partial')), false);
    } finally {
      disk.unmount();
    }
  });

  it('I-5 kill -9 in the middle of a restore leaves the old state or the restored one', async () => {
    const value = await counter();
    const file = await backup();
    await increment();
    await installation.ctlJson('stop', 'web1');
    for (const barrier of ['restore.announced', 'store.commit', 'anchor.stated', 'restore.written']) {
      const before = await generation();
      await installation.killManager();
      await installation.startManager({ nodeArgs: prelude(barrier) });
      await installation.ctl('restore', file, '--key', key, '--accept-rollback');
      await until('the manager is dead', () => installation.manager?.signalCode === 'SIGKILL');
      await installation.startManager();
      assert.ok((await generation()) >= before, barrier);
    }
    await killed('restore.entry', 'restore', file, '--key-file', key, '--accept-rollback');
    const last = await generation();
    await installation.ctlJson('restore', file, '--key', key, '--accept-rollback');
    assert.ok((await generation()) > last);
    await installation.ctlJson('start', 'web1');
    assert.equal(await counter(), value);
  });

  it('I-9 kill -9 in the middle of a rebuild leaves nothing that starts, and it is repeated', async () => {
    const value = await counter();
    const file = await backup();
    await installation.ctlJson('stop', 'web1');
    await installation.stopDaemons();
    const { manager, toolstack } = installation.paths;
    rmSync(manager.directory, { recursive: true });
    const toolstackKey = 'ab'.repeat(32);
    const args = ['rebuild', file, '--key-file', key, '--toolstack-key', toolstackKey];
    for (const barrier of ['rebuild.entry', 'store.commit', 'anchor.stated', 'rebuild.counted']) {
      await killed(barrier, ...args);
      assert.equal(existsSync(manager.enrolment), false, barrier);
      const start = await run(process.execPath, [
        join(REPOSITORY, 'manager/bin/vtpm-managerd.js'),
        '--home',
        installation.home,
      ]);
      assert.match(start.stderr, /\((not-initialised|store-missing)\)/, barrier);
    }
    assert.ok(readFileSync(toolstack.key).length > 0);
    await installation.ctlJson('rebuild', file, '--key', key, '--accept-rollback');
    await installation.start();
    await installation.ctlJson('start', 'web1');
    assert.equal(await counter(), value);
  });
});
