import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import { once } from 'node:events';
import {
  appendFileSync,
  chmodSync,
  copyFileSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  realpathSync,
  rmSync,
  statSync,
  symlinkSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { cleanEnvironment, REPOSITORY } from '../support/installation.js';
import { InstalledHost } from '../support/installed-host.js';
import { until } from '../support/until.js';

/** @returns path of the package */
function build(directory: string, umask = '022'): string {
  const command = `umask ${umask}; exec "$@"`;
  const program = [process.execPath, join(REPOSITORY, 'scripts/package.mjs'), '--out', directory];
  const env = cleanEnvironment({ SOURCE_DATE_EPOCH: '1700000000' });
  return execFileSync('sh', ['-c', command, 'sh', ...program], { env, encoding: 'utf8' }).trim();
}

/** libtpms0 as it is installed here, in a higher version and with a library that is another file, each time. */
function newerLibtpms(directory: string, time: number): string {
  const field = (name: string): string =>
    execFileSync('dpkg-query', ['--show', `--showformat=\${${name}}`, 'libtpms0'], { encoding: 'utf8' });
  const stage = join(directory, `libtpms0-${time}`);
  const link = execFileSync('dpkg-query', ['--listfiles', 'libtpms0'], { encoding: 'utf8' })
    .split('\n')
    .find((path) => path.endsWith('/libtpms.so.0')) as string;
  const library = realpathSync(link);
  mkdirSync(join(stage, dirname(library)), { recursive: true });
  mkdirSync(join(stage, 'DEBIAN'));
  copyFileSync(library, join(stage, library));
  // Behind all that the loader reads.
  appendFileSync(join(stage, library), `upgraded ${time}`);
  chmodSync(join(stage, library), 0o644);
  if (!existsSync(join(stage, link))) symlinkSync(library, join(stage, link));
  const sum = createHash('md5')
    .update(readFileSync(join(stage, library)))
    .digest('hex');
  writeFileSync(join(stage, 'DEBIAN/md5sums'), `${sum}  ${library.slice(1)}\n`);
  writeFileSync(
    join(stage, 'DEBIAN/control'),
    `Package: libtpms0\nVersion: ${field('Version')}+test${time}\nArchitecture: ${field('Architecture')}\nMulti-Arch: same\nMaintainer: test <root@localhost>\nDescription: test\n`,
  );
  const file = `${stage}.deb`;
  execFileSync('dpkg-deb', ['--root-owner-group', '-Zgzip', '--build', stage, file], { stdio: 'ignore' });
  return file;
}

/** Ends the one process of the host that runs a program, and waits for it. */
const ended = `for at in /proc/[0-9]*; do
  if tr '\\0' ' ' < $at/cmdline | grep -q "^/usr/bin/node /usr/sbin/$1 "; then kill $(basename $at); while [ -e $at/exe ]; do sleep 0.1; done; fi
done 2>/dev/null; true`;

/**
 * Runs a command as ProtectSystem=strict and PrivateTmp=yes do it, with these ReadWritePaths: below /run, /var and all else
 * nothing more can be written. Not what /dev, /proc and /sys hold.
 */
const strict = `for path in $1; do
  case $path in -*) path=\${path#-}; [ -e "$path" ] || continue;; esac
  mount --bind "$path" "$path" || exit
done
mount -t tmpfs tmpfs /tmp && mount -o remount,bind,ro / && mount -o remount,bind,ro /run || exit
shift; exec "$@"`;

describe('the Debian package', function () {
  this.timeout(180_000);
  let directory: string;
  let file: string;
  let host: InstalledHost;

  before(async function () {
    // Mounting takes root.
    if (process.getuid?.() !== 0) this.skip();
    directory = mkdtempSync(join(tmpdir(), 'vtpm-deb-'));
    file = build(join(directory, 'first'));
    host = await InstalledHost.create();
  });
  after(async () => {
    // Their cgroups are this machine's, and go with the workers.
    await host?.run('vtpmctl', 'down');
    await host?.destroy();
    if (directory) rmSync(directory, { recursive: true, force: true });
  });

  const ctl = (...args: string[]) => host.succeed('vtpmctl', ...args);
  const json = async (...args: string[]) => JSON.parse(await ctl('--json', ...args));
  const random = async (name: string): Promise<void> => {
    assert.match(await ctl('exec', name, '--', 'tpm2_getrandom', '--hex', '4'), /^[0-9a-f]{8}$/);
  };

  it('is the same bytes from the same sources', () => {
    const again = build(join(directory, 'second'), '077');
    const digest = (path: string) => createHash('sha256').update(readFileSync(path)).digest('hex');
    assert.equal(digest(again), digest(file));
  });

  it('holds what runs, and names each of its files in its sums', () => {
    const x = join(directory, 'x');
    execFileSync('dpkg-deb', ['--raw-extract', file, x]);
    const sums = readFileSync(join(x, 'DEBIAN/md5sums'), 'utf8').trim().split('\n');
    const named = sums.map((line) => line.slice(34));
    const all = readdirSync(x, { recursive: true, withFileTypes: true })
      .filter((item) => item.isFile())
      .map((item) => join(item.parentPath, item.name).slice(x.length + 1))
      .filter((path) => !path.startsWith('DEBIAN/') && !path.startsWith('etc/'));
    assert.deepEqual(named.sort(), all.sort());
    assert.deepEqual(
      all.filter((path) => /\.(ts|map|tsbuildinfo)$|\/esbuild\/|\/typescript\/|fast-check/.test(path)),
      [],
    );
    for (const path of all) assert.equal(statSync(join(x, path)).mode & 0o022, 0, path);
  });

  it('is installed with a user for the manager, and does the main job', async () => {
    await host.install(file);
    assert.match(await host.succeed('id', 'vtpm'), /\(tss\)/);
    await ctl('init', '--tpm', 'embedded', '--recovery-key-file', '/root/recovery.key');
    await ctl('up');
    const { isNew, note } = await json('image', 'allow', '--installed');
    assert.equal(isNew, true);
    assert.match(note, /^packages: vtpm-manager [^,]+, nodejs [^,]+, .*libtpms0 /);
    const { digest, parts, argv, allowed } = await json('image', 'show');
    assert.deepEqual([allowed.digest, allowed.note], [digest, note]);
    assert.ok(argv.at(-1).startsWith('/app/'));
    for (const name of ['/usr/bin/node', argv.at(-1)]) {
      assert.ok(
        parts.some((part: { name: string }) => part.name === name),
        name,
      );
    }
    const other = 'ab'.repeat(32);
    await ctl('image', 'allow', other, '--note', 'by hand');
    await ctl('image', 'deny', other);
    assert.deepEqual(
      (await json('image', 'list')).images.map((image: { digest: string }) => image.digest),
      [digest],
    );
    await ctl('create', 'web1');
    await ctl('start', 'web1');
    await random('web1');
    const { findings } = await json('doctor');
    const bad = findings.filter(({ level }: { level: string }) => level === 'problem');
    assert.deepEqual(bad, []);
    const owners = await host.succeed('sh', '-c', 'cd /var/lib/vtpm-manager; stat -c "%U %a %n" * manager/*');
    for (const line of owners.trim().split('\n')) {
      const [owner, mode, name = ''] = line.split(' ');
      assert.equal(owner, name.startsWith('manager') ? 'vtpm' : 'root', line);
      assert.match(mode ?? '', /^[67]00$/, line);
    }
    const pid = (await host.succeed('head', '-n1', '/run/vtpm-manager/manager.pid')).trim();
    assert.equal((await host.succeed('stat', '-c', '%U', `/proc/${pid}`)).trim(), 'vtpm');
  });

  it('follows an upgrade of libtpms: the new image is allowed, the old one not, and guests stay', async () => {
    const before = (await json('image', 'list')).current;
    const { worker } = await json('show', 'web1');
    const said = await host.install(newerLibtpms(directory, 1));
    assert.doesNotMatch(said, /vTPMs start from the worker image before/);
    const { images, current } = await json('image', 'list');
    assert.notEqual(current, before);
    assert.deepEqual(
      images.map(({ digest, note }: { digest: string; note: string }) => [
        digest,
        /libtpms0 \S+\+test1/.test(note),
      ]),
      [[current, true]],
    );
    assert.equal((await json('show', 'web1')).worker.pid, worker.pid);
    await random('web1');
    await ctl('create', 'web2');
    await ctl('start', 'web2');
    await random('web2');
    await ctl('stop', 'web1');
    await ctl('start', 'web1');
    await random('web1');
    const again = await json('image', 'allow', '--installed');
    assert.deepEqual([again.isNew, again.digest], [false, current], 'nothing to do');
  });

  it('runs as its units say: the same commands, users and privileges', async () => {
    await ctl('down');
    const unit = (name: string) => readFileSync(host.path(`/lib/systemd/system/${name}.service`), 'utf8');
    const command = (text: string) => /^ExecStart=(.*)$/m.exec(text)?.[1]?.split(' ') ?? [];
    const manager = unit('vtpm-managerd');
    assert.match(manager, /^User=vtpm\nGroup=vtpm\n#.*\nSupplementaryGroups=tss$/m);
    assert.match(manager, /^CapabilityBoundingSet=$/m);
    const asVtpm = [
      '--reuid=vtpm',
      '--regid=vtpm',
      '--init-groups',
      '--bounding-set=-all',
      '--inh-caps=-all',
    ];
    const kept = /^CapabilityBoundingSet=(.+)$/m
      .exec(unit('vtpm-supervisord'))?.[1]
      ?.toLowerCase()
      .split(' ');
    const ofRoot = `--bounding-set=-all,${kept?.map((name) => `+${name.slice('cap_'.length)}`).join()}`;
    const supervisor = unit('vtpm-supervisord');
    const start = (text: string, privileges: string[]) => {
      assert.match(text, /^ProtectSystem=strict$/m);
      const writable = /^ReadWritePaths=(.*)$/m.exec(text)?.[1] ?? '';
      const confined = ['--mount', 'sh', '-c', strict, 'sh', writable];
      return host.start('unshare', ...confined, 'setpriv', '--no-new-privs', ...privileges, ...command(text));
    };
    // Of those that ran before: the host may just have been started, and its file systems in memory be empty.
    await host.succeed('rm', '-f', '/run/vtpm-worker-uids.lock');
    for (const [, line = ''] of supervisor.matchAll(/^ExecStartPre=\+(.*)$/gm))
      await host.succeed('sh', '-c', line);
    const daemons = [start(manager, asVtpm), start(supervisor, [ofRoot])];
    await until('both serve', async () => {
      const { code, stdout } = await host.run('vtpmctl', '--json', 'doctor');
      return code === 0 && stdout.includes('the supervisor runs');
    });
    await ctl('start', 'web1');
    await random('web1');
    await ctl('stop', 'web1');
    // nsenter is what was started here; what it runs ends with its standard error.
    for (const name of ['vtpm-supervisord', 'vtpm-managerd'])
      await host.succeed('sh', '-c', ended, 'sh', name);
    await Promise.all(daemons.map((child) => child.exitCode ?? once(child, 'exit')));
    await ctl('up');
    for (const name of ['web1', 'web2']) await ctl('start', name);
  });

  it('does not allow what no package vouches for', async () => {
    const before = await json('image', 'list');
    const refused = async (path: string, why: RegExp): Promise<void> => {
      const { code, stderr } = await host.run('vtpmctl', 'image', 'allow', '--installed');
      assert.deepEqual([code, why.test(stderr), stderr.includes(path)], [1, true, true], stderr);
      assert.deepEqual(await json('image', 'list'), before);
    };
    const manifest = '/usr/lib/vtpm-manager/node_modules/vtpmd/dist/bundle/image.json';
    const changes: [string, RegExp][] = [
      [manifest, /is not as vtpm-manager \S+ has it/],
      // It decides how workers are confined.
      [
        '/usr/lib/vtpm-manager/node_modules/vtpm-toolstack/dist/supervisor/sandbox.js',
        /is not as vtpm-manager/,
      ],
      ['/usr/bin/node', /is not as nodejs \S+ has it/],
    ];
    for (const [path, why] of changes) {
      await host.succeed('cp', '-a', path, '/root/kept');
      // A new file: the one that runs is not written to.
      await host.succeed(
        'sh',
        '-c',
        'cp -a "$1" /root/new && printf " " >> /root/new && mv /root/new "$1"',
        'sh',
        path,
      );
      await refused(path, why);
      await host.succeed('mv', '/root/kept', path);
    }
    await host.succeed('mkdir', '-p', '/usr/local/lib/bundle');
    await host.succeed('sh', '-c', `cp -a ${dirname(manifest)}/. /usr/local/lib/bundle`);
    await host.succeed('mv', dirname(manifest), '/root/bundle');
    await host.succeed('ln', '-s', '/usr/local/lib/bundle', dirname(manifest));
    await refused('vtpmd.cjs', /is missing|is of no package|is not as/);
    await host.succeed('rm', dirname(manifest));
    await host.succeed('mv', '/root/bundle', dirname(manifest));
    assert.equal((await json('image', 'allow', '--installed')).isNew, false, 'positive control');
  });

  it('leaves the supervisor as it is while its next worker image is not allowed, and says so', async () => {
    const settings = '/etc/default/vtpm-manager';
    const reload = /^ExecReload=(.*)$/m.exec(
      readFileSync(host.path('/lib/systemd/system/vtpm-supervisord.service'), 'utf8'),
    )?.[1];
    // What the maintainer scripts tell systemd, of which there is none here.
    const systemctl = `#!/bin/sh\necho "$*" >> /root/told\n[ "$1" != reload ] || exec ${reload}\n`;
    const put = (path: string, text: string) =>
      host.succeed('sh', '-c', 'printf %s "$2" > "$1" && chmod 755 "$1"', 'sh', path, text);
    const told = async () => /^reload vtpm-supervisord/m.test(await host.succeed('cat', '/root/told'));
    const survivesItsWorker = async (): Promise<void> => {
      const { worker } = await json('show', 'web1');
      await host.succeed('kill', '-9', String(worker.pid));
      await until('another worker serves', async () => {
        const now = await json('show', 'web1');
        return now.state === 'running' && now.worker.pid !== worker.pid;
      });
      await random('web1');
    };
    await host.succeed('mkdir', '-p', '/run/systemd/system');
    await host.succeed('sh', '-c', 'cp -a "$(command -v systemctl)" /root/systemctl 2>/dev/null; true');
    await put('/usr/bin/systemctl', systemctl);
    await host.succeed('cp', '-a', settings, '/root/settings');
    await put(settings, 'VTPM_ALLOW_INSTALLED=no\n');

    const before = (await json('image', 'list')).images;
    assert.match(await host.install(newerLibtpms(directory, 2)), /until somebody has looked at it/);
    const said = await host.install(file);
    assert.match(said, /vtpmctl image allow --installed && systemctl reload vtpm-supervisord/);
    assert.equal(await told(), false);
    assert.deepEqual((await json('image', 'list')).images, before);
    await survivesItsWorker();

    await ctl('image', 'allow', '--installed', '--replace');
    await host.succeed('systemctl', 'reload', 'vtpm-supervisord');
    await survivesItsWorker();

    await host.succeed('mv', '/root/settings', settings);
    await host.succeed('rm', '/root/told');
    assert.doesNotMatch(await host.install(file), /vtpmctl image allow/);
    assert.equal(await told(), true, 'positive control');
    await survivesItsWorker();
    await host.succeed('rm', '-r', '/run/systemd');
    await host.succeed('sh', '-c', 'mv /root/systemctl /usr/bin/systemctl || rm /usr/bin/systemctl');
  });

  it('is installed over itself while guests run, and is removed without their keys', async () => {
    const { worker } = await json('show', 'web1');
    await host.install(file);
    assert.equal((await json('show', 'web1')).worker.pid, worker.pid);
    await ctl('stop', 'web1');
    await ctl('start', 'web1');
    await random('web1');
    await ctl('down');
    await host.succeed('dpkg', '--remove', 'vtpm-manager');
    assert.notEqual((await host.run('test', '-e', '/usr/bin/vtpmctl')).code, 0);
    const { stderr } = await host.run('dpkg', '--purge', 'vtpm-manager');
    assert.match(stderr, /the virtual TPMs stay in/);
    await host.install(file);
    await ctl('up');
    await ctl('start', 'web1');
    await random('web1');
    await ctl('down');
  });
});
