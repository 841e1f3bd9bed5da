import assert from 'node:assert/strict';
import { once } from 'node:events';
import { readdirSync, readFileSync, readlinkSync, statSync } from 'node:fs';
import type { Socket } from 'node:net';
import { dirname } from 'node:path';
import { findHierarchies } from 'vtpm-toolstack/supervisor/cgroups';
import { WorkerUids } from 'vtpm-toolstack/supervisor/worker-uids';
import {
  buildStubImage,
  connectDoor,
  exchange,
  removeDirectory,
  StubManager,
  SupervisorProcess,
  temporaryDirectory,
  until,
  workersOf,
} from './supervisor-fixture.js';

describe('the upgrade of a running vtpm-supervisord', function () {
  this.timeout(120_000);
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
  beforeEach(async () => {
    home = temporaryDirectory();
    supervisor = await new SupervisorProcess(home, manifest, ['--log-format', 'json']).ready();
    manager = new StubManager(supervisor.paths);
    await manager.start();
  });
  afterEach(async () => {
    await supervisor.end('SIGKILL');
    await manager.stop();
    removeDirectory(home);
  });

  async function running(name: string, change: Parameters<SupervisorProcess['create']>[1] = {}) {
    await supervisor.create(name, { ...change });
    const { status, body } = await supervisor.call('POST', `/vtpms/${name}/start`);
    assert.equal(status, 200, JSON.stringify(body));
    return body;
  }

  async function upgrade(): Promise<void> {
    const { status, body } = await supervisor.call('POST', '/upgrade');
    assert.equal(status, 200, `${JSON.stringify(body)} ${supervisor.stderr}`);
  }

  /** The vTPM when another worker serves it. */
  // biome-ignore lint/suspicious/noExplicitAny: as the answers are.
  async function next(name: string, before: { worker: { pid: number } }): Promise<any> {
    await until(async () => {
      const { state, worker } = await view(name);
      return state === 'running' && worker.pid !== before.worker.pid;
    });
    return await view(name);
  }

  const view = async (name: string) => (await supervisor.call('GET', `/vtpms/${name}`)).body;

  it('keeps workers, connections and doors, and goes on with all of them', async () => {
    const web1 = await running('web1');
    const dev1 = await running('dev1', { isolation: 'none' });
    const guest = await connectDoor(web1.sockets.tpm);
    const other = await connectDoor(dev1.sockets.tcti);
    for (let round = 1; round <= 3; round++) {
      await upgrade();
      assert.equal(await exchange(guest, `guest ${round}`), `guest ${round}`);
      assert.equal(await exchange(other, `other ${round}`), `other ${round}`);
      assert.equal((await supervisor.call('GET', '/health')).body.upgrades, round);
      const now = await view('web1');
      assert.deepEqual([now.state, now.worker], [web1.state, web1.worker]);
      assert.deepEqual((await view('dev1')).worker, dev1.worker);
      const next = await connectDoor(web1.sockets.tcti);
      assert.equal(await exchange(next, 'new'), 'new');
      next.end();
      await once(next, 'close');
    }
    // The worker closes its end, and with it the supervisor's.
    guest.end();
    await once(guest, 'close');
    const stopped = await supervisor.call('POST', '/vtpms/web1/stop');
    assert.deepEqual([stopped.body.state, stopped.body.reason], ['stopped', null]);
    assert.equal((await supervisor.call('POST', '/vtpms/web1/start')).body.epoch, 2);
    assert.equal(await supervisor.end('SIGTERM'), 0, supervisor.stderr);
    assert.deepEqual(workersOf(supervisor.paths), []);
    assert.deepEqual(readdirSync(supervisor.paths.supervisor.doors), []);
  });

  it('reads a line on that was half said before', async () => {
    const { sockets, worker } = await running('web1');
    const guest = await connectDoor(sockets.tpm);
    assert.equal(await exchange(guest, 'half'), 'half');
    await upgrade();
    assert.equal(await exchange(guest, 'rest'), 'rest');
    // A message of the next connection comes after it.
    const next = await connectDoor(sockets.tpm);
    assert.equal(await exchange(next, 'x'), 'x');
    next.destroy();
    await upgrade();
    const { state, worker: now } = await view('web1');
    assert.deepEqual([state, now.pid], ['running', worker.pid]);
  });

  it('leaves its children no descriptor that is not theirs, and loses none of its own', async () => {
    const { worker, sockets } = await running('web1');
    const guest = await connectDoor(sockets.tpm);
    await exchange(guest, 'x');
    await upgrade();
    await quiet();
    const before = descriptorsOf(supervisor.pid).length;
    for (let round = 0; round < 6; round++) await upgrade();
    assert.equal(await exchange(guest, 'y'), 'y');
    // The last call's connection may still be closing.
    await until(() => descriptorsOf(supervisor.pid).length <= before);
    const dev1 = await running('dev1', { isolation: 'none' });
    const sockets3 = descriptorsOf(dev1.worker.pid).filter((target) => target.startsWith('socket'));
    assert.equal(sockets3.length, 4, 'its link, its two channels and its standard error');
    assert.equal((await view('web1')).worker.pid, worker.pid);
  });

  it('remembers the uid and the groups of a worker: nobody else gets them, and they go with it', async () => {
    const { worker } = await running('web1');
    const uid = statSync(`/proc/${worker.pid}`).uid;
    const groups = groupsOf(supervisor.pid);
    await upgrade();
    assert.ok(!isFree(uid), 'the lock of the uid is still held');
    const web2 = await running('web2');
    assert.notEqual(statSync(`/proc/${web2.worker.pid}`).uid, uid);
    assert.ok(groupsOf(supervisor.pid).length > groups.length);
    for (const name of ['web1', 'web2']) {
      assert.equal((await supervisor.call('POST', `/vtpms/${name}/stop`)).body.reason, null);
    }
    assert.ok(isFree(uid));
    assert.deepEqual(groupsOf(supervisor.pid), []);
  });

  it('takes its workers along when it is killed afterwards', async () => {
    await running('web1');
    await running('dev1', { isolation: 'none' });
    await upgrade();
    assert.notDeepEqual(workersOf(supervisor.paths), []);
    await supervisor.end('SIGKILL');
    await until(() => workersOf(supervisor.paths).length === 0);
  });

  it('sees a worker that died while the program changed, and another one goes on', async () => {
    const web1 = await running('web1');
    const guest = await connectDoor(web1.sockets.tpm);
    const id = await exchange(guest, 'who');
    const upgraded = supervisor.call('POST', '/upgrade');
    // The last that the program before says.
    await until(() => supervisor.stderr.includes('goes on as the program that is installed now'));
    process.kill(web1.worker.pid, 'SIGKILL');
    assert.equal((await upgraded).status, 200);
    const now = await next('web1', web1);
    assert.deepEqual([now.vmRunId, now.epoch], [web1.vmRunId, 2]);
    assert.equal(await exchange(guest, 'who'), id);
    assert.deepEqual(zombiesOf(supervisor.pid), []);
  });

  it('notices the end of a worker that it took over, and how it came', async () => {
    const web1 = await running('web1');
    const guest = await connectDoor(web1.sockets.tpm);
    const id = await exchange(guest, 'who');
    await upgrade();
    guest.write('crash');
    await next('web1', web1);
    assert.match(supervisor.stderr, /exit status 7/);
    assert.equal(await exchange(guest, 'who'), id);
    assert.deepEqual(zombiesOf(supervisor.pid), []);
  });

  it('goes on with a restart that waits for the manager, and with a TPM that is lost', async () => {
    const web1 = await running('web1');
    const web2 = await running('web2', { verbs: ['MANUFACTURE', 'COLD'] });
    const guest = await connectDoor(web1.sockets.tpm);
    const id = await exchange(guest, 'who');
    const other = await connectDoor(web2.sockets.tpm);
    other.write('crash');
    await until(async () => (await view('web2')).state === 'lost');
    await manager.stop();
    guest.write('crash');
    await until(async () => (await view('web1')).state === 'restarting');
    const before = [await view('web1'), await view('web2')];
    await upgrade();
    const after = [await view('web1'), await view('web2')];
    assert.deepEqual(
      after.map(({ state, worker }) => [state, worker]),
      before.map(({ state, worker }) => [state, worker]),
    );
    assert.equal(after[1].reason, before[1].reason);
    assert.equal(await exchange(other, 'still connected'), 'still connected');
    await manager.start();
    const now = await next('web1', web1);
    assert.deepEqual([now.vmRunId, now.epoch], [web1.vmRunId, 2]);
    assert.equal(await exchange(guest, 'who'), id);
    assert.equal((await supervisor.call('POST', '/vtpms/web2/start')).body.state, 'running');
  });

  it('answers calls that are under way first, and those that come meanwhile afterwards', async () => {
    await supervisor.create('web1');
    let greet: () => void = () => undefined;
    manager.beforeGreeting = () => new Promise((resolve) => (greet = resolve));
    const started = supervisor.call('POST', '/vtpms/web1/start');
    await until(async () => (await view('web1')).state === 'starting');
    const upgraded = supervisor.call('POST', '/upgrade');
    await until(async () => (await supervisor.create('web2')).status === 409);
    const early = await connectApi();
    manager.beforeGreeting = undefined;
    greet();
    assert.equal((await started).body.state, 'running');
    const calls = Array.from({ length: 50 }, () => supervisor.call('GET', '/vtpms'));
    assert.equal((await upgraded).status, 200);
    for (const { status, body } of await Promise.all(calls)) {
      assert.equal(status, 200);
      assert.equal(body.vtpms[0].state, 'running');
    }
    early.destroy();
    assert.equal((await supervisor.create('web2')).status, 201);
  });

  it('lets no more in at a door than before: those who stood in it count', async () => {
    const { sockets } = await running('web1');
    const guests = await Promise.all(Array.from({ length: 64 }, () => connectDoor(sockets.tpm)));
    for (const guest of guests) assert.equal(await exchange(guest, 'x'), 'x');
    await upgrade();
    const heardAt = async (path: string): Promise<string> => {
      const socket = await connectDoor(path);
      let heard = '';
      socket.on('error', () => undefined);
      socket.on('data', (data) => {
        heard += data;
        socket.destroy();
      });
      socket.write('x');
      await new Promise((resolve) => socket.once('close', resolve));
      return heard;
    };
    assert.equal(await heardAt(sockets.tpm), '');
    assert.equal(await exchange(guests[0]!, 'still there'), 'still there');
    assert.equal(await heardAt(sockets.tcti), 'x', 'another door');
    for (const guest of guests) guest.destroy();
    await until(async () => (await heardAt(sockets.tpm)) === 'x');
  });

  it('is not held up by who does not read his answers', async () => {
    await running('web1');
    const deaf = (await connectApi()).pause();
    deaf.on('error', () => undefined);
    // More than the kernel holds of the answers.
    deaf.write('GET /vtpms HTTP/1.1\r\nHost: x\r\n\r\n'.repeat(4000));
    await upgrade();
    assert.equal((await supervisor.call('GET', '/health')).body.upgrades, 1);
    assert.equal((await supervisor.call('POST', '/vtpms/web1/stop')).body.reason, null);
    deaf.destroy();
  });

  function connectApi(): Promise<Socket> {
    return connectDoor(supervisor.paths.supervisor.socket);
  }

  /** What comes and goes by itself (the manager's events, the pool) is as it was. */
  async function quiet(): Promise<void> {
    await until(async () => {
      const { body } = await supervisor.call('GET', '/health');
      return body.managerConnected && body.pool.idle === body.pool.target && body.pool.starting === 0;
    });
  }
});

/** Kinds of what a process has open, sorted: numbers of sockets and addresses of files differ. */
function descriptorsOf(pid: number): string[] {
  return readdirSync(`/proc/${pid}/fd`)
    .flatMap((fd) => {
      try {
        return [readlinkSync(`/proc/${pid}/fd/${fd}`).replace(/\[\d+\]$/, '')];
      } catch {
        return [];
      }
    })
    .sort();
}

/** Groups of the workers of a supervisor, wherever they are below the one it is in. */
function groupsOf(pid: number): string[] {
  const parents = new Set([...findHierarchies().values()].flatMap(({ own }) => [own, dirname(own)]));
  return [...parents].flatMap((parent) =>
    readdirSync(parent).filter((name) => name.startsWith(`vtpm-${pid}-`)),
  );
}

/** Whether another supervisor of this host could give the uid to a worker of its own. */
function isFree(uid: number): boolean {
  const others = new WorkerUids({ first: uid, last: uid });
  try {
    others.take();
    return true;
  } catch {
    return false;
  } finally {
    others.close();
  }
}

function zombiesOf(parent: number): number[] {
  const children = readFileSync(`/proc/${parent}/task/${parent}/children`, 'utf8').trim().split(' ');
  return children
    .filter(Boolean)
    .map(Number)
    .filter((pid) => {
      const stat = readFileSync(`/proc/${pid}/stat`, 'utf8');
      return stat.slice(stat.lastIndexOf(')') + 2).startsWith('Z');
    });
}
