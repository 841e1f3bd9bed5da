import assert from 'node:assert/strict';
import { appendFileSync, readlinkSync, utimesSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { isAlive, type ProcessId } from 'vtpm-toolstack/supervisor/processes';
import type { PoolView } from 'vtpm-toolstack/supervisor/worker-pool';
import {
  type Answer,
  buildStubImage,
  connectDoor,
  exchange,
  removeDirectory,
  StubManager,
  SupervisorProcess,
  temporaryDirectory,
  until,
  workersOf,
  writeManifest,
} from './supervisor-fixture.js';

describe('the pool of workers', function () {
  this.timeout(60_000);
  let image: string;
  let manifest: string;
  let home: string;
  let supervisor: SupervisorProcess;
  let manager: StubManager;

  before(async () => {
    image = temporaryDirectory();
    manifest = await buildStubImage(image);
  });
  after(() => removeDirectory(image));
  beforeEach(() => {
    home = temporaryDirectory();
  });
  afterEach(async () => {
    await supervisor.end('SIGKILL');
    await manager.stop();
    removeDirectory(home);
  });

  async function begin(least: number, most: number, flags: string[] = [], worker = manifest): Promise<void> {
    supervisor = await new SupervisorProcess(home, worker, [
      ...['--log-format', 'json', '--pool-min', `${least}`, '--pool-max', `${most}`, ...flags],
    ]).ready();
    manager = new StubManager(supervisor.paths);
    await manager.start();
  }
  const pool = async (): Promise<PoolView> => (await supervisor.call('GET', '/health')).body.pool;
  const idle = (count: number): Promise<void> => until(async () => (await pool()).idle === count);
  const start = (name: string): Promise<Answer> => supervisor.call('POST', `/vtpms/${name}/start`);

  /** Of the workers themselves, without the sandboxes around them. */
  function pids(): number[] {
    const isNode = ({ pid }: ProcessId): boolean => {
      try {
        return readlinkSync(`/proc/${pid}/exe`).endsWith('/node');
      } catch {
        return false;
      }
    };
    return workersOf(supervisor.paths)
      .filter(isNode)
      .map(({ pid }) => pid);
  }

  it('gives a start a worker that was there before, and is filled up again', async () => {
    await begin(2, 4);
    await idle(2);
    const before = pids();
    assert.equal(before.length, 2);
    await supervisor.create('web1');
    const { body } = await start('web1');
    assert.equal(body.state, 'running', JSON.stringify(body));
    assert.ok(before.includes(body.worker.pid), `${body.worker.pid} is one of ${before}`);
    assert.ok(body.worker.layers.includes('namespace:net'));
    const guest = await connectDoor(body.sockets.tpm);
    assert.equal(await exchange(guest, 'x'), 'x');
    guest.destroy();
    await idle(2);
    assert.equal(new Set([...pids(), ...before]).size, 3, 'one worker was made');
    const stopped = await supervisor.call('POST', '/vtpms/web1/stop');
    assert.equal(stopped.body.reason, null);
  });

  it('keeps as many as were started of late, within its bounds', async () => {
    await begin(0, 3);
    assert.deepEqual(await pool(), { idle: 0, starting: 0, target: 0 });
    for (const [name, expected] of [
      ['a', 1],
      ['b', 2],
      ['c', 3],
      ['d', 3],
    ] as const) {
      await supervisor.create(name);
      await start(name);
      await idle(expected);
      assert.equal((await pool()).target, expected);
    }
    assert.equal(pids().length, 7);
  });

  it('leaves the host the memory that it was told to leave', async () => {
    await begin(2, 4, ['--pool-memory-reserve', '16777216']);
    await supervisor.create('web1');
    const { body } = await start('web1');
    assert.equal(body.state, 'running', 'a start needs no pool');
    assert.deepEqual(await pool(), { idle: 0, starting: 0, target: 0 });
    assert.deepEqual(pids(), [body.worker.pid]);
  });

  it('is not for workers that run unconfined', async () => {
    await begin(1, 1);
    await idle(1);
    const [waiting] = pids();
    await supervisor.create('web1', { isolation: 'none' });
    const { body } = await start('web1');
    assert.equal(body.state, 'running', JSON.stringify(body));
    assert.notEqual(body.worker.pid, waiting);
    assert.equal((await pool()).idle, 1);
  });

  it('replaces a worker that ends', async () => {
    await begin(2, 2);
    await idle(2);
    const [killed, kept] = pids();
    process.kill(killed!, 'SIGKILL');
    await until(() => supervisor.stderr.includes('a worker of the pool was lost'));
    await idle(2);
    assert.ok(pids().includes(kept!) && !pids().includes(killed!));
  });

  it('makes workers that are lost at once more and more slowly, and a start says why', async () => {
    const broken = temporaryDirectory();
    writeFileSync(join(broken, 'broken.mjs'), 'process.exit(9);\n');
    try {
      await begin(1, 1, [], writeManifest(broken, ['broken.mjs']));
      const pauses = (): number[] =>
        [...supervisor.stderr.matchAll(/"nextInMs":(\d+)/g)].map(([, pause]) => Number(pause));
      await until(() => pauses().length === 3);
      assert.deepEqual(pauses(), [250, 500, 1000]);
      await supervisor.create('web1');
      const { status, body } = await start('web1');
      assert.deepEqual([status, body.error.code], [502, 'worker-failed']);
      assert.match(body.error.message, /exit status 9/);
    } finally {
      removeDirectory(broken);
    }
  });

  it('I-3 gives a start a fresh worker where the one that it took is lost, and only then', async () => {
    await begin(1, 1);
    await idle(1);
    const [taken] = pids();
    await supervisor.create('web1');
    // It can be taken, and answers nothing.
    process.kill(taken!, 'SIGSTOP');
    const started = start('web1');
    await until(async () => (await supervisor.call('GET', '/vtpms/web1')).body.worker?.pid === taken);
    assert.deepEqual(pids(), [taken], 'no second worker while the first one may run');
    process.kill(taken!, 'SIGKILL');
    const { body } = await started;
    assert.equal(body.state, 'running', JSON.stringify(body));
    assert.notEqual(body.worker.pid, taken);
    assert.match(supervisor.stderr, /the worker from the pool was lost/);
    await idle(1);
    await supervisor.create('web2');
    manager.refuse = { reason: 'image-not-allowed', message: 'image-not-allowed: not this one' };
    const refused = await start('web2');
    assert.equal(refused.body.error.code, 'image-not-allowed');
    assert.equal(manager.tickets.length, 2, 'what the manager refuses is not asked for again');
  });

  it('gives the fresh worker of such a start a memory of its own: what the lost one left is not its', async () => {
    await begin(1, 1);
    await idle(1);
    await supervisor.create('web1');
    manager.refuse = { reason: 'link-lost', message: 'the link to the manager broke' };
    manager.beforeGreeting = async () => {
      await until(() => manager.tickets.length > 0);
      manager.refuse = undefined;
    };
    const { body } = await start('web1');
    assert.equal(body.state, 'running', JSON.stringify(body));
    const [lost, fresh] = manager.memories;
    assert.ok(lost && fresh && lost !== fresh, `${manager.memories}`);
    const guest = await connectDoor(body.sockets.tpm);
    guest.write('crash');
    await until(async () => (await supervisor.call('GET', '/vtpms/web1')).body.epoch === 2);
    assert.equal(manager.memories.at(-1), fresh, 'the run goes on with it');
    guest.destroy();
  });

  it('outlives a restart of the manager', async () => {
    await begin(2, 2);
    await idle(2);
    const before = pids();
    await manager.stop();
    await idle(0);
    assert.deepEqual(await pool(), { idle: 0, starting: 2, target: 2 });
    await supervisor.create('web1');
    const refused = await start('web1');
    assert.equal(refused.body.error.code, 'manager-unreachable');
    await manager.start();
    await idle(2);
    const { body } = await start('web1');
    assert.equal(body.state, 'running', JSON.stringify(body));
    assert.ok(before.includes(body.worker.pid));
  });

  for (const signal of ['SIGKILL', 'SIGTERM'] as const) {
    it(`ends with its supervisor (${signal})`, async () => {
      await begin(2, 2);
      await idle(2);
      const all = workersOf(supervisor.paths);
      assert.ok(all.length >= 2);
      await supervisor.end(signal);
      await until(() => !all.some(isAlive));
    });
  }

  it('is of the newest image alone', async () => {
    const other = temporaryDirectory();
    try {
      await begin(2, 2, [], await buildStubImage(other));
      await idle(2);
      const old = pids();
      appendFileSync(join(other, 'stub.mjs'), '// upgraded');
      const { digest } = (await supervisor.call('PUT', '/image', {})).body;
      await until(() => !pids().some((pid) => old.includes(pid)));
      await idle(2);
      await supervisor.create('web1');
      const { body } = await start('web1');
      assert.equal(body.state, 'running', JSON.stringify(body));
      assert.equal(Buffer.from(manager.tickets[0]?.imageDigest ?? '').toString('hex'), digest);
    } finally {
      removeDirectory(other);
    }
  });

  it('gives up workers whose copy was touched since they were started', async () => {
    await begin(2, 2);
    await idle(2);
    const old = pids();
    const { digest } = (await supervisor.call('GET', '/image')).body;
    const now = new Date();
    utimesSync(join(supervisor.paths.supervisor.images, digest, 'root/app/stub.mjs'), now, now);
    await supervisor.create('web1');
    const { body } = await start('web1');
    assert.equal(body.state, 'running', JSON.stringify(body));
    assert.ok(!old.includes(body.worker.pid), 'a fresh one, of the copy that was measured again');
    await until(() => !pids().some((pid) => old.includes(pid)));
    await idle(2);
  });

  it('is of the image of its supervisor: the next one ends what is left and makes its own', async () => {
    await begin(1, 1);
    await idle(1);
    const [old] = pids();
    process.kill(old!, 'SIGSTOP');
    await supervisor.end('SIGKILL');
    await manager.stop();
    const other = temporaryDirectory();
    try {
      await begin(1, 1, [], await buildStubImage(other, { VTPM_OTHER: '1' }));
      await idle(1);
      const [now] = pids();
      assert.equal(pids().length, 1);
      assert.notEqual(now, old);
    } finally {
      removeDirectory(other);
    }
  });
});
