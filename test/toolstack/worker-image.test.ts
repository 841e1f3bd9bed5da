import assert from 'node:assert/strict';
import { execFileSync, spawn } from 'node:child_process';
import { once } from 'node:events';
import {
  chmodSync,
  cpSync,
  existsSync,
  linkSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  statSync,
  utimesSync,
  writeFileSync,
} from 'node:fs';
import { join } from 'node:path';
import type { ToolstackError } from 'vtpm-toolstack/error';
import { prepareImage, type WorkerImage } from 'vtpm-toolstack/supervisor/image';
import { collectSources } from 'vtpm-toolstack/supervisor/image-sources';
import { descendants } from 'vtpm-toolstack/supervisor/processes';
import {
  bareCommand,
  type Command,
  type ImageCommand,
  SANDBOX_TEMPLATE,
  sandboxCommand,
} from 'vtpm-toolstack/supervisor/sandbox';
import { checkUntouched } from 'vtpm-toolstack/supervisor/worker-images';
import { removeDirectory, temporaryDirectory, writeManifest } from './supervisor-fixture.js';

describe('the worker image', function () {
  this.timeout(120_000);
  let directory: string;
  let images: string;
  const program =
    "console.log(JSON.stringify({ said: 'measured', env: process.env, args: process.argv.slice(2) }))";

  beforeEach(() => {
    directory = temporaryDirectory();
    images = join(directory, 'images');
    writeFileSync(join(directory, 'main.mjs'), program);
  });
  afterEach(() => removeDirectory(directory));

  function prepare(change: Record<string, unknown> = {}): WorkerImage {
    return prepareImage(collectSources(writeManifest(directory, ['main.mjs'], change)), images);
  }
  function rewrite(path: string, content: Buffer): void {
    const { atime, mtime } = statSync(path);
    chmodSync(path, 0o644);
    writeFileSync(path, content);
    chmodSync(path, 0o444);
    utimesSync(path, atime, mtime);
  }
  function replace(path: string): void {
    cpSync(path, `${path}.new`, { recursive: true, preserveTimestamps: true });
    renameSync(path, `${path}.old`);
    renameSync(`${path}.new`, path);
    rmSync(`${path}.old`, { recursive: true });
  }
  function forAWhile(path: string, make: (path: string) => void): void {
    make(path);
    rmSync(path);
  }
  /** With what a plain user can have, but for the filter, which no program of these tests is written for. */
  function sandboxed(command: ImageCommand): Command {
    return sandboxCommand(command, { limits: true, groups: [], filtersItself: true });
  }
  function run({ file, args, env }: Command): string {
    return execFileSync(file, args, { env, encoding: 'utf8' });
  }

  it('runs the copy that was measured, not the source it was made from', () => {
    const { command } = prepare();
    assert.match(run(sandboxed(command)), /measured/);
    writeFileSync(join(directory, 'main.mjs'), "console.log('swapped')");
    assert.match(run(sandboxed(command)), /measured/);
    assert.match(run(bareCommand(command)), /measured/);
    // The same method does see another program where the copy itself is another one.
    assert.match(run(sandboxed(prepare().command)), /swapped/);
  });

  it('has another digest when anything that is executed is another', () => {
    const digests = [prepare().digest];
    digests.push(prepare({ nodeArguments: ['--no-warnings', '--no-deprecation'] }).digest);
    digests.push(prepare({ environment: { MALLOC_ARENA_MAX: '2' } }).digest);
    writeFileSync(join(directory, 'other.txt'), '');
    digests.push(
      prepare({
        files: [
          { name: 'main.mjs', source: 'main.mjs', target: '/app/main.mjs' },
          { name: 'other.txt', source: 'other.txt', target: '/app/other.txt' },
        ],
      }).digest,
    );
    writeFileSync(join(directory, 'main.mjs'), `${program} `);
    digests.push(prepare().digest);
    assert.equal(new Set(digests).size, digests.length);
    writeFileSync(join(directory, 'main.mjs'), program);
    assert.equal(prepare().digest, digests[0]);
  });

  it('holds node, the loader, every library and the manifest files, read-only, and no other copy', () => {
    const first = prepare();
    writeFileSync(join(directory, 'main.mjs'), `${program} `);
    const { digest, parts, command } = prepare();
    assert.notEqual(first.digest, digest);
    assert.deepEqual(readdirSync(images), [digest]);
    for (const name of ['/usr/bin/node', '/app/main.mjs', command.loader, `${command.libraries}/libc.so.6`]) {
      const mode = parts.find((part) => part.name === name)?.mode;
      assert.equal(mode, name.startsWith('/usr/bin') || name === command.loader ? '555' : '444', name);
    }
    const withTpm = prepare({ libraries: ['libtpms.so.0'] });
    for (const library of ['libtpms.so.0', 'libcrypto.so.3']) {
      assert.ok(
        withTpm.parts.some(({ name }) => name === `${command.libraries}/${library}`),
        library,
      );
    }
  });

  it('measures a copy that is there again, and replaces one that was changed', () => {
    const first = prepare();
    const place = join(first.command.root, 'app/main.mjs');
    const made = statSync(place).ino;
    assert.deepEqual(prepare(), first);
    assert.equal(statSync(place).ino, made, 'a good copy is kept');
    chmodSync(place, 0o644);
    writeFileSync(place, "console.log('tampered')");
    chmodSync(place, 0o444);
    const again = prepare();
    assert.deepEqual([again.digest, again.parts, again.command], [first.digest, first.parts, first.command]);
    assert.match(run(sandboxed(again.command)), /measured/);
    writeFileSync(join(first.command.root, 'added'), '');
    prepare();
    assert.equal(existsSync(join(first.command.root, 'added')), false);
  });

  it('knows a process that runs from another tree than the measured one, and one that was touched meanwhile', async () => {
    writeFileSync(join(directory, 'main.mjs'), "console.log('up'); setInterval(() => {}, 1000);");
    const image = prepare();
    const other = join(directory, 'other');
    cpSync(image.command.root, other, { recursive: true, preserveTimestamps: true });
    const changed = (error: unknown) => (error as ToolstackError).code === 'image-changed';
    const check = async (root: string, look: (root: string) => void): Promise<void> => {
      const { file, args, env } = sandboxed({ ...image.command, root });
      const child = spawn(file, args, { env, stdio: ['ignore', 'pipe', 'inherit'] });
      try {
        await once(child.stdout, 'data');
        look(`/proc/${descendants(child.pid ?? -1).at(-1)?.pid}/root`);
      } finally {
        child.kill('SIGKILL');
        await once(child, 'close');
      }
    };
    await check(image.command.root, (root) => checkUntouched(image, root));
    await check(other, (root) => assert.throws(() => checkUntouched(image, root), changed));
    // Each of these leaves content, mode and time of modification as they were.
    const file = join(image.command.root, 'app/main.mjs');
    const touches: [string, () => void][] = [
      ['rewritten', () => rewrite(file, readFileSync(file))],
      ['replaced', () => replace(file)],
      ['a directory replaced', () => replace(join(image.command.root, 'app'))],
      ['another name for a while', () => forAWhile(`${other}.link`, (path) => linkSync(file, path))],
      ['a file beside it for a while', () => forAWhile(`${file}.x`, (path) => writeFileSync(path, ''))],
    ];
    for (const [what, touch] of touches) {
      const measured = prepare();
      checkUntouched(measured, undefined);
      touch();
      assert.throws(() => checkUntouched(measured, undefined), changed, what);
    }
  });

  it('refuses a manifest that is missing, damaged or newer', () => {
    const hasCode = (code: string) => (error: unknown) => (error as ToolstackError).code === code;
    assert.throws(() => collectSources(join(directory, 'none.json')), hasCode('missing-package'));
    const cases: [Record<string, unknown>, string][] = [
      [{ format: 2 }, 'newer-format'],
      [{ version: '9.9.9' }, 'newer-format'],
      [{ main: 'none' }, 'corrupt'],
      [{ files: [{ name: 'main.mjs', source: 'main.mjs', target: '/app/../main.mjs' }] }, 'corrupt'],
      [{ environment: { A: 1 } }, 'corrupt'],
      [{ libraries: ['libnone.so.9'] }, 'missing-package'],
    ];
    for (const [change, code] of cases)
      assert.throws(() => prepare(change), hasCode(code), JSON.stringify(change));
  });

  describe('in the sandbox', () => {
    const probe = `
      import { readFileSync, readdirSync, writeFileSync } from 'node:fs';
      const tried = {};
      for (const path of ['/x', '/app/main.mjs', '/dev/x', '/dev/shm/x', '/proc/sys/kernel/hostname', '/proc/self/comm']) {
        try { writeFileSync(path, 'x'); tried[path] = 'written'; } catch (error) { tried[path] = error.code; }
      }
      const status = Object.fromEntries(readFileSync('/proc/self/status', 'utf8').split('\\n').map((l) => l.split(':\\t')));
      const net = readFileSync('/proc/net/dev', 'utf8').split('\\n').slice(2).map((l) => l.split(':')[0].trim()).filter(Boolean);
      console.log(JSON.stringify({ tried, status, net, env: process.env, root: readdirSync('/'), uid: process.getuid() }));
    `;

    it('can write nothing, see no network and no environment, and has no capability', () => {
      writeFileSync(join(directory, 'main.mjs'), probe);
      const { command } = prepare();
      const seen = JSON.parse(run(sandboxed(command)));
      assert.deepEqual(new Set(Object.values(seen.tried)), new Set(['EROFS']), JSON.stringify(seen.tried));
      assert.deepEqual(seen.net, ['lo']);
      assert.deepEqual(seen.env, { MALLOC_ARENA_MAX: '1', PWD: '/' });
      assert.equal(seen.uid, 4242);
      for (const set of ['CapEff', 'CapPrm', 'CapBnd']) assert.match(seen.status[set], /^0+$/);
      assert.equal(seen.status.NoNewPrivs, '1');
      assert.equal(seen.root.includes('etc'), false);
    });

    it('would let root write the kernel settings in /proc without the remount (positive control)', function () {
      if (process.getuid?.() !== 0) this.skip();
      writeFileSync(join(directory, 'main.mjs'), probe);
      const { file, args, env } = sandboxed(prepare().command);
      const at = args.indexOf('/proc', args.indexOf('--remount-ro'));
      const weaker = args.filter((_, index) => index !== at && index !== at - 1);
      const seen = JSON.parse(run({ file, args: weaker, env, descriptors: [] }));
      assert.equal(seen.tried['/proc/sys/kernel/hostname'], 'written');
    });

    it('is asked for with every layer that bubblewrap has', () => {
      for (const argument of [
        '--unshare-all',
        '--unshare-user',
        '--disable-userns',
        '--new-session',
        '--die-with-parent',
        '--clearenv',
      ]) {
        assert.ok(SANDBOX_TEMPLATE.includes(argument), argument);
      }
      const { args, env } = sandboxed(prepare().command);
      assert.deepEqual(env, {});
      assert.deepEqual(args.slice(args.lastIndexOf('--')), [
        '--',
        '/usr/bin/node',
        '--no-warnings',
        '/app/main.mjs',
      ]);
    });
  });
});
