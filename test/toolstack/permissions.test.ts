import assert from 'node:assert/strict';
import { createHash } from 'node:crypto';
import { chmodSync, existsSync, mkdirSync, readFileSync, statSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { end, Installation, run } from '../support/installation.js';

/** Numbers that no account needs to have: the kernel compares nothing else. */
const GUEST = { uid: 54321, gid: 54322 };
const STRANGER = { uid: 54399, gid: 54399 };
const isRoot = process.getuid?.() === 0;

/** TPM2_GetRandom of 8 bytes on a door, by a process of that user. @returns the response code, or why not */
async function getRandomAs({ uid, gid }: { uid: number; gid: number }, door: string): Promise<string> {
  const client = `
    const socket = require('node:net').connect(${JSON.stringify(door)});
    socket.on('connect', () => socket.write(Buffer.from('80010000000c0000017b0008', 'hex')));
    socket.on('data', (answer) => { console.log(answer.readUInt32BE(6)); socket.destroy(); });
    socket.on('error', (error) => console.log(error.code));`;
  const user = ['--reuid', String(uid), '--regid', String(gid), '--clear-groups'];
  const { stdout, stderr } = await run('setpriv', [...user, process.execPath, '-e', client]);
  assert.equal(stderr, '');
  return stdout.trim();
}

const modeOf = (path: string) => (statSync(path).mode & 0o7777).toString(8);
const ownerOf = (path: string) => `${statSync(path).uid}:${statSync(path).gid}`;

describe('who may use a door', function () {
  this.timeout(180_000);
  let installation: Installation;

  before(async function () {
    // Giving a socket to another user is root's to do.
    if (!isRoot) this.skip();
    installation = await Installation.create({ tpm: 'embedded' });
    await installation.start();
  });
  after(() => installation?.destroy());

  const openTheWay = () => {
    for (const path of [installation.directory, installation.home]) chmodSync(path, 0o711);
  };
  const closeTheWay = () => {
    for (const path of [installation.directory, installation.home]) chmodSync(path, 0o700);
  };

  it('refuses an owner who could never get to the socket, and registers nothing', async () => {
    closeTheWay();
    const { code, stderr } = await installation.ctl('create', 'far', '--socket-owner', '54321:54322');
    assert.equal(code, 1);
    assert.match(stderr, /user 54321 cannot get to sockets below .*--run-dir/);
    assert.deepEqual((await installation.ctlJson('list')).vtpms, []);
    assert.equal(modeOf(installation.paths.run), '700');
  });

  it('is by itself the business of the supervisor’s user alone', async () => {
    const { run: runDirectory, supervisor } = installation.paths;
    openTheWay();
    const door = await installation.vtpm('own');
    assert.deepEqual([modeOf(runDirectory), modeOf(supervisor.doors)], ['700', '700']);
    assert.deepEqual([modeOf(join(supervisor.doors, 'own')), modeOf(door)], ['700', '600']);
    assert.equal(await getRandomAs(GUEST, door), 'EACCES');
    assert.equal(await getRandomAs({ uid: 0, gid: 0 }, door), '0');
  });

  it('--socket-owner lets that user in, and its group, and no third user', async () => {
    openTheWay();
    const door = await installation.vtpm('web1', '--socket-owner', `${GUEST.uid}:${GUEST.gid}`);
    assert.deepEqual([ownerOf(door), modeOf(door)], ['54321:54322', '660']);
    // Passing only, and nobody can put another socket in the place of this one.
    const directory = join(installation.paths.supervisor.doors, 'web1');
    assert.deepEqual([ownerOf(directory), modeOf(directory)], ['0:0', '711']);
    assert.equal(await getRandomAs(GUEST, door), '0');
    assert.equal(await getRandomAs({ uid: GUEST.uid, gid: STRANGER.gid }, door), '0', 'by its user');
    assert.equal(await getRandomAs({ uid: STRANGER.uid, gid: GUEST.gid }, door), '0', 'by its group');
    assert.equal(await getRandomAs(STRANGER, door), 'EACCES');
    // The way to one is not the way to another, nor to the daemons.
    assert.equal(await getRandomAs(GUEST, installation.door('own')), 'EACCES');
    for (const path of [installation.paths.supervisor.socket, installation.paths.manager.adminSocket]) {
      assert.equal(await getRandomAs(GUEST, path), 'EACCES');
    }
    const shown = await installation.ctlJson('show', 'web1');
    assert.deepEqual([shown.socketOwner, shown.socketMode], ['54321:54322', '0660']);
  });

  it('--socket-mode 0600 keeps the group out; every door has the same owner', async () => {
    openTheWay();
    const door = await installation.vtpm('web2', '--socket-owner', '54321:54322', '--socket-mode', '0600');
    assert.equal(await getRandomAs(GUEST, door), '0');
    assert.equal(await getRandomAs({ uid: STRANGER.uid, gid: GUEST.gid }, door), 'EACCES');
    for (const file of ['tpm.sock', 'tcti.sock', 'tcti.sock.ctrl']) {
      const path = join(installation.paths.supervisor.doors, 'web2', file);
      assert.deepEqual([ownerOf(path), modeOf(path)], ['54321:54322', '600'], file);
    }
  });

  it('takes names of accounts, and refuses what is none, before anything is made', async () => {
    openTheWay();
    await installation.ctlJson('create', 'named', '--socket-owner', 'nobody');
    const shown = await installation.ctlJson('show', 'named');
    const [, , uid, gid] = (await run('getent', ['passwd', 'nobody'])).stdout.split(':');
    assert.deepEqual([shown.socketOwner, shown.socketMode], [`${uid}:${gid}`, '0600']);
    for (const [args, message] of [
      [['--socket-owner', 'no-such-user'], /no user "no-such-user"/],
      [['--socket-owner', 'nobody:no-such-group'], /no group "no-such-group"/],
      [['--socket-owner', 'a:b:c'], /USER or USER:GROUP/],
      [['--socket-owner', '4294967295:0'], /no user/],
      [['--socket-owner', 'nobody', '--socket-mode', '0666'], /0600 .* or 0660/],
      [['--socket-mode', '0660'], /add --socket-owner/],
    ] as const) {
      const { code, stderr } = await installation.ctl('create', 'refused', ...args);
      assert.equal(code, 2, args.join(' '));
      assert.match(stderr, message);
    }
  });

  it('survives a restart of the supervisor, which reads lists of the former format too', async () => {
    const { vtpms: listPath, doors } = installation.paths.supervisor;
    await end(installation.supervisor, 'SIGTERM');
    chmodSync(installation.paths.run, 0o700);
    await installation.startSupervisor();
    assert.equal(modeOf(installation.paths.run), '711');
    await installation.ctlJson('start', 'web1');
    assert.equal(await getRandomAs(GUEST, installation.door('web1')), '0');
    await installation.ctlJson('stop', 'web1');
    await end(installation.supervisor, 'SIGTERM');

    const list = JSON.parse(readFileSync(listPath, 'utf8')) as { vtpms: Record<string, unknown>[] };
    const later = ['socketOwner', 'socketMode', 'doors', 'stateBlobs', 'dropin', 'migration', 'moved'];
    const vtpms = list.vtpms.map((vtpm) =>
      Object.fromEntries(Object.entries(vtpm).filter(([name]) => !later.includes(name))),
    );
    const sha256 = createHash('sha256').update(JSON.stringify(vtpms)).digest('hex');
    writeFileSync(listPath, JSON.stringify({ format: 1, sha256, vtpms }));
    await installation.startSupervisor();
    // Nobody's doors belong to others any more: the way is closed again.
    assert.deepEqual([modeOf(installation.paths.run), modeOf(doors)], ['700', '700']);
    await installation.ctlJson('start', 'web1');
    assert.deepEqual([ownerOf(installation.door('web1')), modeOf(installation.door('web1'))], ['0:0', '600']);
    assert.equal(await getRandomAs(GUEST, installation.door('web1')), 'EACCES');
  });
});

describe('a supervisor of a plain user', function () {
  this.timeout(60_000);

  it('gives no socket to others: it is refused when it is asked for', async function () {
    if (!isRoot) this.skip();
    // The rule itself, in a process that has really become that user, once it has read its code as root: the checkout
    // may be where that user cannot go.
    const program = `
      import { checkAccess } from ${JSON.stringify(import.meta.resolve('vtpm-toolstack/supervisor/door-access'))};
      import { pathsOf } from ${JSON.stringify(import.meta.resolve('vtpm-common'))};
      process.setgroups([]);
      process.setgid(54322);
      process.setuid(54321);
      for (const socketOwner of process.argv.slice(1)) {
        try { checkAccess({ socketOwner, socketMode: '0660' }, pathsOf('/tmp/x', '/tmp/x')); console.log('ok'); }
        catch (error) { console.log(error.code); }
      }`;
    const owners = ['54321:54322', '54321:54399', '54399:54322', '0:0'];
    const { stdout, stderr } = await run(process.execPath, ['--input-type=module', '-e', program, ...owners]);
    assert.equal(stdout, 'ok\nbad-request\nbad-request\nbad-request\n', stderr);
  });
});

describe('the modes of files', function () {
  this.timeout(120_000);

  it('are private even where the caller’s umask is not', async () => {
    const installation = await Installation.create({ tpm: 'embedded' });
    const before = process.umask(0);
    try {
      await installation.start();
      await installation.vtpm('web1');
      const pending = [installation.home];
      const open: string[] = [];
      for (let path = pending.pop(); path !== undefined; path = pending.pop()) {
        const found = await run('find', [path, '-perm', '/077', '-not', '-type', 'l']);
        open.push(...found.stdout.split('\n').filter((line) => line !== ''));
      }
      // The image is what workers with uids of their own execute, in a view of theirs; above it nobody is let in.
      const { images, directory } = installation.paths.supervisor;
      assert.deepEqual(
        open.filter((path) => path !== images && !path.startsWith(`${images}/`)),
        [],
      );
      assert.deepEqual([modeOf(images), modeOf(directory)], ['711', '700']);
      // The same method does see a file that is open.
      const probe = join(installation.home, 'probe');
      mkdirSync(probe, { mode: 0o755 });
      assert.match((await run('find', [installation.home, '-perm', '/077'])).stdout, /probe/);
      assert.ok(existsSync(probe));
    } finally {
      process.umask(before);
      await installation.destroy();
    }
  });
});
