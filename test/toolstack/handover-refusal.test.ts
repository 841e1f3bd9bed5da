import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { constants, copyFileSync, existsSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import type { Socket } from 'node:net';
import { join } from 'node:path';
import { pathToFileURL } from 'node:url';
import { bootId } from 'vtpm-common';
import { HANDOVER_FORMAT } from 'vtpm-toolstack/supervisor/handover/state';
import { isAlive, type ProcessId, processId } from 'vtpm-toolstack/supervisor/processes';
import { reapAtExit } from '../support/reap.js';
import {
  buildStubImage,
  connectDoor,
  exchange,
  removeDirectory,
  StubManager,
  SUPERVISOR,
  SupervisorProcess,
  temporaryDirectory,
  until,
  workersOf,
} from './supervisor-fixture.js';

const REAL = `await import(${JSON.stringify(SUPERVISOR)});`;

describe('a running vtpm-supervisord whose program is another one now', function () {
  this.timeout(60_000);
  let image: string;
  let manifest: string;
  let home: string;
  let program: string;
  let node: string;
  let supervisor: SupervisorProcess;
  let manager: StubManager;
  let guest: Socket;
  let pid: number;

  beforeEach(async () => {
    image = temporaryDirectory();
    manifest = await buildStubImage(image);
    home = temporaryDirectory();
    program = join(image, 'vtpm-supervisord.mjs');
    writeFileSync(program, REAL);
    // A copy that a test may take away.
    node = join(image, 'node');
    copyFileSync(process.execPath, node, constants.COPYFILE_FICLONE);
    supervisor = await start();
    manager = new StubManager(supervisor.paths);
    await manager.start();
    await supervisor.create('web1');
    const started = (await supervisor.call('POST', '/vtpms/web1/start')).body;
    assert.equal(started.state, 'running', JSON.stringify(started));
    const { sockets, worker } = started;
    pid = worker.pid;
    guest = await connectDoor(sockets.tpm);
    guest.on('error', () => undefined);
    assert.equal(await exchange(guest, 'before'), 'before');
  });
  afterEach(async () => {
    guest.destroy();
    await supervisor.end('SIGKILL');
    await manager.stop();
    removeDirectory(home);
    removeDirectory(image);
  });

  function start(): Promise<SupervisorProcess> {
    const flags = ['--log-format', 'json'];
    return new SupervisorProcess(home, manifest, flags, { program, node }).ready();
  }

  async function isRefused(message: RegExp): Promise<void> {
    const { status, body } = await supervisor.call('POST', '/upgrade');
    assert.deepEqual([status, body.error?.code], [409, 'upgrade-refused'], JSON.stringify(body));
    assert.match(body.error.message, message);
    assert.match(body.error.message, /goes on as before/);
    assert.equal(await exchange(guest, 'after'), 'after');
    const now = (await supervisor.call('GET', '/vtpms/web1')).body;
    assert.deepEqual([now.state, now.worker.pid], ['running', pid]);
    const next = await connectDoor(now.sockets.tpm);
    assert.equal(await exchange(next, 'next'), 'next');
    next.destroy();
    // Nothing is held up either.
    assert.equal((await supervisor.create('web2')).status, 201);
    assert.equal((await supervisor.call('POST', '/vtpms/web2/start')).body.state, 'running');
    assert.equal((await supervisor.call('GET', '/health')).body.upgrades, 0);
  }

  it('is refused where the new program has a mistake, and done when that is mended', async () => {
    writeFileSync(program, 'this is no program');
    await isRefused(/SyntaxError/);
    writeFileSync(program, REAL);
    assert.equal((await supervisor.call('POST', '/upgrade')).status, 200);
    assert.equal(await exchange(guest, 'later'), 'later');
  });

  it('is refused where the new program is missing', async () => {
    rmSync(program);
    await isRefused(/Cannot find module/);
  });

  it('is refused where the new program does not know what is handed over', async () => {
    const older = `
      if (process.argv.includes('--check-handover')) {
        process.stderr.write('vtpm-supervisord: the running one hands over in format 9 [newer-format]\\n');
        process.exit(1);
      }
      ${REAL}`;
    writeFileSync(program, older);
    await isRefused(/hands over in format 9 \[newer-format\]/);
  });

  it('is refused where a downgrade leads to a program that knows of no hand-over', async () => {
    writeFileSync(
      program,
      `process.stderr.write("error: unknown option '--check-handover'\\n"); process.exit(1);`,
    );
    await isRefused(/unknown option '--check-handover'/);
  });

  it('is refused where no worker could be started afterwards', async () => {
    const before = readFileSync(manifest);
    rmSync(manifest);
    try {
      await isRefused(/image\.json/);
    } finally {
      writeFileSync(manifest, before);
    }
  });

  it('is refused where a user of the drop-in is none of this host any more', async () => {
    const settings = supervisor.paths.config;
    writeFileSync(settings, JSON.stringify({ 'dropin-users': 'nobody-of-this-name' }));
    await isRefused(/dropin-users names "nobody-of-this-name"/);
  });

  it('is refused where the kernel does not execute it, at the last moment', async () => {
    writeFileSync(
      program,
      `import { rmSync } from 'node:fs';
       if (process.argv.includes('--check-handover')) rmSync(process.execPath);
       else ${REAL}`,
    );
    await isRefused(/execve .*No such file/);
  });

  it('is asked to stop just before: the upgrade is refused, and the workers are stopped in order', async () => {
    await supervisor.end('SIGKILL');
    guest.destroy();
    // As separate modules: nothing in a bundle can be replaced.
    const module = new URL('../dist/supervisor/supervisor.js', pathToFileURL(SUPERVISOR));
    const main = new URL('../dist/supervisor-main.js', pathToFileURL(SUPERVISOR));
    writeFileSync(
      program,
      `const { Supervisor } = await import(${JSON.stringify(module.href)});
      const { rest } = Supervisor.prototype;
      Supervisor.prototype.rest = async function () {
        await rest.call(this);
        process.kill(process.pid, 'SIGTERM');
      };
      await import(${JSON.stringify(main.href)});`,
    );
    supervisor = await start();
    await supervisor.create('web3');
    assert.equal((await supervisor.call('POST', '/vtpms/web3/start')).body.state, 'running');
    const { status, body } = await supervisor.call('POST', '/upgrade');
    assert.deepEqual([status, body.error?.code], [409, 'busy'], JSON.stringify(body));
    assert.equal(await supervisor.end(), 0, supervisor.stderr);
    assert.deepEqual(workersOf(supervisor.paths), []);
  });

  it('is asked to stop while it loads: it takes over first, so that the workers are stopped in order', async () => {
    const early = new URL('../dist/supervisor/handover/early-signals.js', pathToFileURL(SUPERVISOR));
    writeFileSync(
      program,
      `import ${JSON.stringify(early.href)};
       if (process.argv.includes('--handover')) process.kill(process.pid, 'SIGTERM');
       ${REAL}`,
    );
    await supervisor.call('POST', '/upgrade').catch(() => undefined);
    assert.equal(await supervisor.end(), 0, supervisor.stderr);
    assert.match(supervisor.stderr, /"vtpm":"web1","msg":"stopped"/);
    assert.doesNotMatch(supervisor.stderr, /stopped by force/);
  });

  it('reads nothing of calls that come while the next program is tried: that one answers them', async () => {
    const isTried = join(image, 'tried');
    const mayGoOn = join(image, 'go-on');
    writeFileSync(
      program,
      `import { existsSync, writeFileSync } from 'node:fs';
       if (process.argv.includes('--check-handover')) {
         writeFileSync(${JSON.stringify(isTried)}, '');
         while (!existsSync(${JSON.stringify(mayGoOn)})) await new Promise((resolve) => setTimeout(resolve, 5));
       }
       ${REAL}`,
    );
    const upgraded = supervisor.call('POST', '/upgrade');
    await until(() => existsSync(isTried));
    const health = supervisor.call('GET', '/health');
    const created = supervisor.create('web2');
    assert.equal(await exchange(guest, 'meanwhile'), 'meanwhile');
    writeFileSync(mayGoOn, '');
    assert.equal((await upgraded).status, 200);
    assert.equal((await health).body.upgrades, 1);
    assert.equal((await created).status, 201);
  });

  it('I-3 kills a worker that cannot be taken over, and no other one; another goes on', async () => {
    await supervisor.create('web2');
    const web2 = (await supervisor.call('POST', '/vtpms/web2/start')).body;
    const other = await connectDoor(web2.sockets.tpm);
    assert.equal(await exchange(other, 'before'), 'before');
    const worker = processId(pid) as ProcessId;
    // The channel that descriptors are passed on is lost on the way.
    writeFileSync(
      program,
      `import { closeSync, fstatSync, readSync } from 'node:fs';
       const at = process.argv.indexOf('--handover');
       if (at > 0) {
         const fd = Number(process.argv[at + 1]);
         const text = Buffer.alloc(fstatSync(fd).size);
         readSync(fd, text, 0, text.length, 0);
         const { vtpms } = JSON.parse(text);
         closeSync(vtpms.find(({ served }) => served.worker.processes.some(({ pid }) => pid === ${pid})).served.worker.descriptors);
       }
       ${REAL}`,
    );
    assert.equal((await supervisor.call('POST', '/upgrade')).status, 200);
    assert.ok(!isAlive(worker));
    assert.match(supervisor.stderr, /descriptor \d+, which is not open.*the worker cannot be taken over/);
    await until(async () => (await supervisor.call('GET', '/vtpms/web1')).body.epoch === 2);
    assert.equal(await exchange(guest, 'after'), 'after');
    assert.equal(await exchange(other, 'after'), 'after');
    assert.equal((await supervisor.call('GET', '/vtpms/web2')).body.worker.pid, web2.worker.pid);
    other.destroy();
  });

  it('I-3 leaves no worker where the new program ends although it said that it would not', async () => {
    writeFileSync(program, `if (!process.argv.includes('--check-handover')) process.exit(1);`);
    await assert.rejects(supervisor.call('POST', '/upgrade'));
    assert.equal(await supervisor.end(), 1);
    await until(() => workersOf(supervisor.paths).length === 0);
    writeFileSync(program, REAL);
    supervisor = await start();
    const { state, reason } = (await supervisor.call('GET', '/vtpms/web1')).body;
    assert.deepEqual([state, reason], ['crashed', 'the supervisor ended and its workers with it']);
  });
});

describe('a hand-over that no supervisor made', function () {
  this.timeout(60_000);
  let home: string;
  before(() => {
    home = temporaryDirectory();
  });
  after(() => removeDirectory(home));

  /** As the process id of whom it is given to, where it has `@pid@`. */
  async function given(content: string | Buffer, flag = '3'): Promise<string> {
    const file = join(home, 'given');
    writeFileSync(file, content);
    const script =
      'sed "s/\\"@pid@\\"/$$/" "$1" > "$1.state"; exec "$2" "$3" --home "$4" --handover "$5" 3< "$1.state" 4< "$1"';
    const child = reapAtExit(
      spawn('/bin/sh', ['-c', script, 'sh', file, process.execPath, SUPERVISOR, join(home, 'h'), flag], {
        stdio: ['ignore', 'ignore', 'pipe'],
      }),
    );
    let said = '';
    child.stderr?.setEncoding('utf8').on('data', (text: string) => {
      said += text;
    });
    const [status] = (await once(child, 'close')) as [number];
    assert.equal(status, 1, said);
    return said.trim();
  }

  const state = (change: object = {}) =>
    JSON.stringify({
      format: HANDOVER_FORMAT,
      version: '0.1.0',
      pid: '@pid@',
      boot: bootId().toString('hex'),
      times: 1,
      descriptors: [],
      locks: [],
      confinements: { uidLock: null, groups: 0 },
      api: { listener: 5, waiting: [], caller: null },
      autostart: [],
      vtpms: [],
      ...change,
    });

  it('is refused by name, whatever is wrong with it', async () => {
    assert.match(await given('garbage'), /not JSON \[corrupt\]$/);
    assert.match(await given(Buffer.from([0xff, 0, 1, 2])), /not JSON \[corrupt\]$/);
    assert.match(
      await given(state({ format: HANDOVER_FORMAT + 1 })),
      /hands over in format .*\[newer-format\]$/,
    );
    assert.match(await given(state({ surprise: 1 })), /surprise is not known \[corrupt\]$/);
    assert.match(await given(state({ pid: 1 })), /of process 1 and for that one only \[corrupt\]$/);
    assert.match(await given(state({ boot: '0'.repeat(32) })), /for that one only \[corrupt\]$/);
    assert.match(
      await given(state({ descriptors: [4711], locks: [4711] })),
      /descriptor 4711, which is not open, .*\[corrupt\]$/,
    );
    assert.match(
      await given(state({ locks: [77] })),
      /descriptor 77, which is not open, not named .*\[corrupt\]$/,
    );
    assert.match(await given(state(), '99'), /descriptor 99 does not hold a hand-over.*\[corrupt\]$/);
    assert.match(await given(state(), '0'), /named by the number of its descriptor \[usage\]$/);
    assert.match(await given(state(), '1; true'), /named by the number of its descriptor \[usage\]$/);
  });

  it('is refused where its locks are none of the installation', async () => {
    // Descriptor 4 is a file like any other.
    assert.match(
      await given(state({ descriptors: [4], locks: [4] })),
      /does not hold the lock .*\[corrupt\]$/,
    );
  });

  it('is not read from what is no file', async () => {
    assert.match(
      await given(state(), '2'),
      /descriptor 2 does not hold a hand-over: it is no file.*\[corrupt\]$/,
    );
  });
});
