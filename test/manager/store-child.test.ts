import assert from 'node:assert/strict';
import { execFileSync, spawn, spawnSync } from 'node:child_process';
import { once } from 'node:events';
import {
  copyFileSync,
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  statSync,
  truncateSync,
  writeFileSync,
} from 'node:fs';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { openLmdbStore, type StateStore } from 'vtpm-manager/store/index';
import { contentOf, refusal, StoreFixture, WRITER } from './store-fixture.js';

describe('store process', () => {
  let fixture: StoreFixture;
  beforeEach(() => {
    fixture = new StoreFixture();
  });
  afterEach(() => fixture.destroy());

  describe('records', () => {
    it('keep content and version over a restart', async () => {
      const store = await fixture.open(true);
      const large = contentOf('large', 1, 3 * 1024 * 1024);
      assert.equal(
        await store.commit([
          { key: 'vtpm/a', expectedVersion: 0, value: Buffer.from('one') },
          { key: 'vtpm/empty', expectedVersion: 0, value: Buffer.alloc(0) },
          { key: 'vtpm/large', expectedVersion: 0, value: large },
        ]),
        true,
      );
      assert.equal(
        await store.commit([{ key: 'vtpm/a', expectedVersion: 1, value: Buffer.from('two') }]),
        true,
      );
      await store.close();
      const again = await fixture.open();
      assert.deepEqual(await again.get('vtpm/a'), { key: 'vtpm/a', version: 2, value: Buffer.from('two') });
      assert.deepEqual((await again.get('vtpm/empty'))?.value, Buffer.alloc(0));
      assert.deepEqual((await again.get('vtpm/large'))?.value, large);
      assert.equal(await again.get('vtpm/b'), undefined);
    });

    it('are removed by null, and only in the expected version', async () => {
      const store = await fixture.open(true);
      await store.commit([{ key: 'a', expectedVersion: 0, value: Buffer.from('x') }]);
      assert.equal(await store.commit([{ key: 'a', expectedVersion: 2, value: null }]), false);
      assert.equal(await store.commit([{ key: 'a', expectedVersion: 1, value: null }]), true);
      assert.equal(await store.get('a'), undefined);
    });

    it('are listed by pages, in order, each once', async () => {
      const store = await fixture.open(true);
      const keys = Array.from({ length: 50 }, (_, i) => `vtpm/${i}`);
      await store.commit(keys.map((key) => ({ key, expectedVersion: 0, value: contentOf(key, 1) })));
      // Six of these reach a page's bytes long before its count.
      const large = Array.from({ length: 6 }, (_, i) => `z/${i}`);
      for (const key of large) {
        await store.commit([{ key, expectedVersion: 0, value: contentOf(key, 1, 2 * 1024 * 1024) }]);
      }
      const listed: string[] = [];
      for (;;) {
        const page = await store.list(listed.at(-1), 7);
        if (page.length === 0) break;
        assert.ok(page.length <= 7);
        assert.ok(page.reduce((sum, { value }) => sum + value.length, 0) <= 8 * 1024 * 1024);
        for (const { key, version, value } of page) {
          assert.equal(version, 1);
          assert.deepEqual(value, contentOf(key, 1, value.length));
          listed.push(key);
        }
      }
      assert.deepEqual(listed, [...keys, ...large].sort());
    });

    it('are refused by name where they are too large or have no proper key', async () => {
      const store = await fixture.open(true);
      const write = (key: string, value: Uint8Array) => store.commit([{ key, expectedVersion: 0, value }]);
      await assert.rejects(write('a', Buffer.alloc(4 * 1024 * 1024 + 1)), refusal('too-large'));
      for (const key of ['', 'two words', 'ü', 'x'.repeat(129)]) {
        await assert.rejects(write(key, Buffer.alloc(1)), refusal('bad-request'));
      }
      const four = Array.from({ length: 4 }, (_, i) => `k${i}`);
      await assert.rejects(
        store.commit(four.map((key) => ({ key, expectedVersion: 0, value: Buffer.alloc(4 * 1024 * 1024) }))),
        refusal('too-large'),
      );
      assert.equal(await write('a', Buffer.alloc(1)), true);
    });
  });

  describe('compare-and-set', () => {
    it('I-4 a commit with one stale write writes nothing', async () => {
      const store = await fixture.open(true);
      await store.commit([{ key: 'b', expectedVersion: 0, value: Buffer.from('b1') }]);
      const isDone = await store.commit([
        { key: 'a', expectedVersion: 0, value: Buffer.from('a1') },
        { key: 'b', expectedVersion: 0, value: Buffer.from('b?') },
        { key: 'c', expectedVersion: 0, value: Buffer.from('c1') },
      ]);
      assert.equal(isDone, false);
      assert.equal(await store.get('a'), undefined);
      assert.equal(await store.get('c'), undefined);
      assert.deepEqual((await store.get('b'))?.value, Buffer.from('b1'));
    });

    it('of many racing commits for one version, one wins', async () => {
      const store = await fixture.open(true);
      for (let version = 0; version < 5; version++) {
        const results = await Promise.all(
          Array.from({ length: 20 }, (_, i) =>
            store.commit([{ key: 'a', expectedVersion: version, value: Buffer.from(`${version} ${i}`) }]),
          ),
        );
        assert.equal(results.filter(Boolean).length, 1);
        assert.equal((await store.get('a'))?.version, version + 1);
      }
    });
  });

  describe('I-9 opening', () => {
    it('never makes a missing store', async () => {
      await assert.rejects(fixture.open(), refusal('store-missing'));
      assert.equal(existsSync(fixture.directory), false);
      mkdirSync(fixture.directory);
      await assert.rejects(fixture.open(), refusal('store-missing'));
      assert.equal(existsSync(fixture.dataFile), false);
    });

    it('never takes an emptied file for a new store', async () => {
      await (await fixture.open(true)).close();
      for (const bytes of [4096, 100, 0]) {
        truncateSync(fixture.dataFile, bytes);
        await assert.rejects(fixture.open(), refusal('store-corrupt'));
        assert.equal(statSync(fixture.dataFile).size, bytes);
      }
    });

    it('never makes a store over another one', async () => {
      const store = await fixture.open(true);
      await store.commit([{ key: 'a', expectedVersion: 0, value: Buffer.from('x') }]);
      await store.close();
      await assert.rejects(fixture.open(true), refusal('already-initialised'));
      assert.equal((await (await fixture.open()).get('a'))?.version, 1);
    });

    it('is refused while another process has the store, and works when that ends', async () => {
      const first = await fixture.open(true);
      await assert.rejects(fixture.open(), refusal('in-use'));
      assert.equal(await first.commit([{ key: 'a', expectedVersion: 0, value: Buffer.from('x') }]), true);
      const second = fixture.open();
      await first.close();
      assert.equal((await (await second).get('a'))?.version, 1);
    });

    it('names a missing bubblewrap', async () => {
      const path = process.env.PATH;
      process.env.PATH = fixture.parent;
      try {
        await assert.rejects(fixture.open(true), refusal('internal', /bubblewrap is not installed/));
      } finally {
        process.env.PATH = path;
      }
    });

    it('says what bubblewrap says where it may not make a sandbox', async () => {
      const open = withProgram(fixture, 'echo "bwrap: No permissions to create new namespace" >&2; exit 1');
      await assert.rejects(open, refusal('internal', /No permissions to create new namespace/));
      assert.deepEqual(fixture.lost, []);
    });

    it('works without a sandbox where that is asked for', async () => {
      const store = await fixture.open(true, false);
      assert.equal(await store.commit([{ key: 'a', expectedVersion: 0, value: Buffer.from('x') }]), true);
      assert.equal((await store.get('a'))?.version, 1);
    });
  });

  describe('sandbox', () => {
    const namespaces = ['user', 'mnt', 'pid', 'net', 'ipc', 'uts'];

    it('leaves the process no network, capability, environment or file but its own', async () => {
      await fixture.open(true);
      const proc = `/proc/${fixture.childPid()}`;
      for (const name of namespaces) {
        assert.notEqual(readlinkSync(`${proc}/ns/${name}`), readlinkSync(`/proc/self/ns/${name}`), name);
      }
      const status = readFileSync(`${proc}/status`, 'utf8');
      for (const name of ['CapInh', 'CapPrm', 'CapEff', 'CapBnd', 'CapAmb']) {
        assert.match(status, new RegExp(`^${name}:\\s+0+$`, 'm'));
      }
      assert.match(status, /^NoNewPrivs:\s+1$/m);
      const names = readFileSync(`${proc}/environ`, 'utf8')
        .split('\0')
        .map((text) => text.split('=')[0]);
      assert.deepEqual(
        names.filter((name) => name !== '' && name !== 'PWD'),
        ['MSGPACKR_NATIVE_ACCELERATION_DISABLED'],
      );
      const root = `${proc}/root`;
      assert.equal(existsSync(join(root, fixture.directory, 'data.mdb')), true);
      const foreign = ['/etc', '/root', '/home', '/var', '/usr/bin/bwrap', '/bin/sh'];
      // Where this checkout itself is in one of them, the way to it is there.
      for (const path of foreign.filter((path) => !import.meta.dirname.startsWith(`${path}/`))) {
        assert.equal(existsSync(join(root, path)), false, path);
      }
      const writable = readFileSync(`${proc}/mountinfo`, 'utf8')
        .trimEnd()
        .split('\n')
        .map((line) => line.split(' '))
        .filter((fields) => fields[5]?.split(',').includes('rw'))
        .map((fields) => fields[4] ?? '')
        .filter((path) => !/^\/dev\//.test(path));
      assert.deepEqual(writable, [fixture.directory]);
    });

    it('is what makes the difference: without it the same looks find everything', async () => {
      await fixture.open(true, false);
      const proc = `/proc/${fixture.childPid()}`;
      for (const name of namespaces) {
        assert.equal(readlinkSync(`${proc}/ns/${name}`), readlinkSync(`/proc/self/ns/${name}`));
      }
      assert.equal(existsSync(join(`${proc}/root`, '/etc')), true);
    });
  });

  describe('loss of the process', () => {
    const pendingOf = (store: StateStore) => [
      store.commit([{ key: 'a', expectedVersion: 0, value: contentOf('a', 1) }]),
      store.get('a'),
      store.list(undefined, 10),
    ];

    for (const [signal, code] of [
      ['SIGKILL', 'internal'],
      ['SIGSEGV', 'store-corrupt'],
      ['SIGBUS', 'store-corrupt'],
    ] as const) {
      for (const sandbox of [true, false]) {
        it(`${signal} ${sandbox ? 'in' : 'without'} the sandbox fails what is asked then and later, and is told once`, async () => {
          const store = await fixture.open(true, sandbox);
          // A stopped process answers nothing, so all of this is under way when it dies.
          const pid = fixture.childPid();
          process.kill(pid, 'SIGSTOP');
          const pending = pendingOf(store).map((asked) =>
            assert.rejects(asked, refusal(code, new RegExp(signal))),
          );
          process.kill(pid, signal);
          // The others wait for a stopped process to go on, unless they are delivered before SIGSTOP is.
          if (signal !== 'SIGKILL') goOn(pid);
          await Promise.all(pending);
          for (const later of pendingOf(store)) await assert.rejects(later, refusal(code));
          assert.deepEqual(
            fixture.lost.map((error) => error.code),
            [code],
          );
          await store.close();
          assert.equal(fixture.lost.length, 1);
          await (await fixture.open()).get('a');
        });
      }
    }

    it('an orderly end is no loss, and what was asked before it is answered', async () => {
      const store = await fixture.open(true);
      const asked = store.commit([{ key: 'a', expectedVersion: 0, value: contentOf('a', 1) }]);
      await store.close();
      assert.equal(await asked, true);
      await assert.rejects(store.get('a'), refusal('shutting-down'));
      assert.deepEqual(fixture.lost, []);
    });
  });

  describe('I-10 a process that answers nonsense', () => {
    // What follows the answer that the store is open, once something is asked; each is one frame or the begin of one.
    const nonsense: [string, number[]][] = [
      ['an answer to nothing', [0, 0, 0, 5, 1, 0, 0, 0, 99]],
      ['an unknown answer', [0, 0, 0, 5, 77, 0, 0, 0, 1]],
      ['a frame that is too short', [0, 0, 0, 4, 1, 0, 0, 0, 1]],
      ['a frame that is too long', [255, 255, 255, 255, 1]],
      ['half a record', [0, 0, 0, 8, 1, 0, 0, 0, 1, 1, 97, 0]],
      ['another record', [0, 0, 0, 19, 1, 0, 0, 0, 1, 1, 98, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0]],
    ];
    for (const [what, bytes] of nonsense) {
      it(`${what} ends it, as store-corrupt`, async () => {
        const script = `
          const channel = new (require('node:net').Socket)({ fd: 3 });
          channel.write(Buffer.from([0, 0, 0, 5, 1, 0, 0, 0, 0]));
          channel.on('data', () => channel.write(Buffer.from([${bytes}])));`;
        const store = await withProgram(fixture, `exec '${process.execPath}' -e "${script}"`);
        const other = assert.rejects(async () => {
          for (;;) await store.list(undefined, 1);
        }, refusal('store-corrupt'));
        await assert.rejects(store.get('a'), refusal('store-corrupt', /nonsense/));
        await other;
        await store.close();
        assert.deepEqual(
          fixture.lost.map((error) => error.code),
          ['store-corrupt'],
        );
      });
    }
  });

  for (const mode of ['sandbox', 'plain']) {
    it(`I-4 a manager killed with -9 takes its ${mode} process along, and the next one has every acknowledged record`, async () => {
      const { storeId, rootKey } = fixture;
      const writer = spawn(
        process.execPath,
        [WRITER, fixture.directory, storeId.toString('hex'), rootKey.toString('hex'), mode, '1000000'],
        { stdio: ['ignore', 'pipe', 'inherit'] },
      );
      const acknowledged = new Map<string, number>();
      for await (const line of createInterface({ input: writer.stdout })) {
        const [key = '', version = ''] = line.split(' ');
        acknowledged.set(key, Number(version));
        if (key === 'vtpm/9' && version === '20') writer.kill('SIGKILL');
      }
      const anchored = await fixture.reopen();
      for (const [key, version] of acknowledged) {
        const entry = await anchored.read(key);
        assert.ok(entry && entry.version >= version, `${key} is back at ${entry?.version}`);
        assert.deepEqual(entry.value, contentOf(key, entry.version));
      }
      await anchored.close();
      assert.throws(() => fixture.childPid(), /^Error: 0 processes/);
    });
  }

  it('a manager killed with -9 takes along even a process that hangs', async () => {
    const { storeId, rootKey } = fixture;
    const writer = spawn(
      process.execPath,
      [WRITER, fixture.directory, storeId.toString('hex'), rootKey.toString('hex'), 'sandbox', '1000000'],
      { stdio: ['ignore', 'pipe', 'inherit'] },
    );
    const lines = createInterface({ input: writer.stdout });
    await once(lines, 'line');
    process.kill(fixture.childPid(), 'SIGSTOP');
    writer.kill('SIGKILL');
    const anchored = await fixture.reopen();
    assert.ok(anchored.size > 0);
    await anchored.close();
  });

  it('I-4 acknowledges a commit only after fdatasync of the data and a synced meta page', async () => {
    const trace = join(fixture.parent, 'trace');
    const { storeId, rootKey } = fixture;
    const calls = 'trace=openat,fdatasync,write,writev,pwrite64,pwritev,sendmsg';
    const { status, error } = spawnSync(
      'strace',
      ['-f', '-y', '-s', '0', '-e', calls, '-o', trace, process.execPath, WRITER].concat(
        fixture.directory,
        storeId.toString('hex'),
        rootKey.toString('hex'),
        ['plain', '20'],
      ),
      { stdio: ['ignore', 'ignore', 'inherit'] },
    );
    assert.equal(error, undefined, 'strace is needed: apt-get install strace');
    assert.equal(status, 0);
    const orders = commitOrders(readFileSync(trace, 'utf8'));
    // The anchor of the new store, then 20 records, one commit each; before them the answer that the store is open.
    assert.ok(orders.length >= 21, `${orders.length} answers`);
    for (const order of orders) assert.match(order, /^(data )*sync (data )*meta $/);
  });

  describe('damaged files', () => {
    /** A store of 200 records of 6000 bytes, closed. */
    async function fill(): Promise<void> {
      const anchored = await fixture.create();
      await Promise.all(
        Array.from({ length: 200 }, (_, i) => anchored.write(`vtpm/${i}`, 0, contentOf(`vtpm/${i}`, 1))),
      );
      await anchored.close();
    }

    it('I-10 a truncated file is a named error, and nobody else notices', async () => {
      await fill();
      const whole = readFileSync(fixture.dataFile);
      for (const bytes of [8192, 12288, 100_000, Math.floor(whole.length / 2), whole.length - 40_000]) {
        writeFileSync(fixture.dataFile, whole.subarray(0, bytes));
        await assert.rejects(fixture.reopen(), refusal('store-corrupt'), `${bytes} bytes`);
      }
      writeFileSync(fixture.dataFile, whole);
      assert.equal((await fixture.reopen()).size, 200);
    });

    it('I-10 flipped bytes anywhere are a named error or not read', async () => {
      await fill();
      const whole = readFileSync(fixture.dataFile);
      const codes = new Set(['store-corrupt', 'rollback-detected', 'newer-format']);
      let refused = 0;
      // A fixed sequence: a failure can be repeated. Half of it falls on page headers.
      let state = 1;
      const random = (below: number) => {
        state = (Math.imul(state, 1103515245) + 12345) >>> 0;
        return (state >>> 8) % below;
      };
      for (let round = 0; round < 24; round++) {
        const damaged = Buffer.from(whole);
        for (let i = 0; i < 30; i++) {
          const at = round % 2 === 0 ? random(whole.length) : random(whole.length / 4096) * 4096 + random(32);
          damaged.writeUInt8(random(256), at);
        }
        writeFileSync(fixture.dataFile, damaged);
        try {
          const anchored = await fixture.reopen();
          assert.equal(anchored.size, 200);
          for (const key of anchored.keys(undefined, 200)) {
            assert.deepEqual((await anchored.read(key))?.value, contentOf(key, 1));
          }
          await anchored.close();
        } catch (error) {
          const { code, message } = error as { code?: string; message: string };
          assert.ok(codes.has(String(code)), `round ${round}: ${code} ${message}`);
          refused++;
        }
      }
      assert.ok(refused > 12, `only ${refused} were noticed`);
    });
  });

  it('I-4 a full disk fails the commit whole, and the store works on when there is room', async () => {
    const room = await limitedRoom(fixture);
    const store = await fixture.open(true);
    room.limit();
    let written = 0;
    const commitPair = (i: number) =>
      store.commit([
        { key: `a/${i}`, expectedVersion: 0, value: contentOf(`a/${i}`, 1, 20_000) },
        { key: `b/${i}`, expectedVersion: 0, value: contentOf(`b/${i}`, 1, 20_000) },
      ]);
    try {
      await assert.rejects(async () => {
        for (; written < 1000; written++) await commitPair(written);
      }, refusal('store-full'));
      await assert.rejects(commitPair(written), refusal('store-full'));
      for (const prefix of ['a', 'b']) {
        assert.equal(await store.get(`${prefix}/${written}`), undefined);
        if (written > 0) assert.ok(await store.get(`${prefix}/${written - 1}`));
      }
      room.widen();
      assert.equal(await commitPair(written), true);
      assert.deepEqual(fixture.lost, []);
      await store.close();
      const again = await fixture.open();
      for (const prefix of ['a', 'b']) {
        for (let i = 0; i <= written; i++) {
          const key = `${prefix}/${i}`;
          assert.deepEqual((await again.get(key))?.value, contentOf(key, 1, 20_000));
        }
      }
      await again.close();
    } finally {
      await store.close();
      room.release();
    }
  });

  it('I-4 a limit of the process and not of the disk fails the commit in the same way', async () => {
    // What a quota does: the file system has room, this process may not use it.
    const store = await fixture.open(true);
    fixture.limitFiles(60_000);
    const commit = (i: number) =>
      store.commit([{ key: `a/${i}`, expectedVersion: 0, value: contentOf(`a/${i}`, 1) }]);
    let written = 0;
    await assert.rejects(async () => {
      for (; written < 100; written++) await commit(written);
    }, refusal('store-full'));
    assert.ok(written > 0);
    fixture.limitFiles(undefined);
    assert.equal(await commit(written), true);
    assert.equal(readdirSync(fixture.directory).includes('space-probe'), false);
  });

  it('a refused directory is an error with its name', async () => {
    const path = join(fixture.parent, 'file');
    copyFileSync(WRITER, path);
    const open = (create: boolean) =>
      openLmdbStore({
        directory: path,
        create,
        sandbox: true,
        log: undefined as never,
        onLost: () => undefined,
      });
    await assert.rejects(open(false), refusal('store-missing', /file does not exist/));
    await assert.rejects(open(true), refusal('internal', /file cannot be opened/));
  });
});

/** Opens the store with a shell script in the place of bubblewrap. */
async function withProgram(fixture: StoreFixture, script: string): Promise<StateStore> {
  const path = process.env.PATH;
  writeFileSync(join(fixture.parent, 'bwrap'), `#!/bin/sh\n${script}\n`, { mode: 0o755 });
  process.env.PATH = `${fixture.parent}:${path}`;
  try {
    return await fixture.open(true);
  } finally {
    process.env.PATH = path;
  }
}

interface Room {
  limit(): void;
  widen(): void;
  release(): void;
}

/** A small disk under the store where this process may mount one, else a limit on the size of the process's files. */
async function limitedRoom(fixture: StoreFixture): Promise<Room> {
  mkdirSync(fixture.directory, { mode: 0o700 });
  const mount = (options: string) =>
    spawnSync('mount', ['-t', 'tmpfs', '-o', `${options}mode=700`, 'tmpfs', fixture.directory]).status;
  if (mount('size=1m,') === 0) {
    return {
      limit: () => undefined,
      widen: () => assert.equal(mount('remount,size=8m,'), 0),
      release: () => execFileSync('umount', [fixture.directory]),
    };
  }
  return {
    limit: () => fixture.limitFiles(60_000),
    widen: () => fixture.limitFiles(undefined),
    release: () => undefined,
  };
}

/**
 * What the store process did to its files between two answers on its socket, for each answer to a commit:
 * `data`, `sync` (fdatasync) and `meta` (a write through the descriptor that LMDB opened with O_DSYNC).
 */
function commitOrders(trace: string): string[] {
  const lines = trace.split('\n');
  const opened = lines.find((line) => /data\.mdb".*O_DSYNC/.test(line));
  const [, pid, dsync] = /^(\d+) .* = (\d+)</.exec(opened ?? '') ?? [];
  assert.ok(pid && dsync, 'LMDB opened its meta descriptor');
  const orders: string[] = [];
  let order = '';
  let isServing = false;
  for (const line of lines) {
    if (line === opened) order = '';
    if (!line.startsWith(`${pid} `)) continue;
    if (/ (write|writev|sendmsg)\(3</.test(line)) {
      // The first answer says that the store is open.
      if (isServing && order !== '') orders.push(order);
      isServing = true;
      order = '';
    } else if (line.includes('data.mdb')) {
      const isMeta = new RegExp(` pwrite64\\(${dsync}<`).test(line);
      order += line.includes(' fdatasync(') ? 'sync ' : isMeta ? 'meta ' : 'data ';
    }
  }
  return orders;
}

function goOn(pid: number): void {
  try {
    process.kill(pid, 'SIGCONT');
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'ESRCH') throw error;
  }
}
