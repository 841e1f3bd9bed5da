import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { readdirSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { isAlive, processId } from 'vtpm-toolstack/supervisor/processes';
import { bareCommand } from 'vtpm-toolstack/supervisor/sandbox';
import {
  buildStubImage,
  connectDoor,
  exchange,
  MANAGER_ID,
  removeDirectory,
  StubManager,
  SupervisorProcess,
  temporaryDirectory,
  until,
  workersOf,
} from './supervisor-fixture.js';

describe('vtpm-supervisord', function () {
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

  const workers = () => workersOf(supervisor.paths);

  it('starts a worker in the sandbox, passes descriptors through its doors and stops it', async () => {
    const created = await supervisor.create('web1');
    assert.equal(created.status, 201);
    assert.equal(created.body.state, 'stopped');
    const { status, body } = await supervisor.call('POST', '/vtpms/web1/start');
    assert.equal(status, 200, JSON.stringify(body));
    assert.equal(body.state, 'running');
    assert.equal(body.epoch, 1);
    for (const layer of [
      'namespace:user',
      'namespace:net',
      'namespace:pid',
      'no-capabilities',
      'no-new-privileges',
      'read-only-root',
    ]) {
      assert.ok(body.worker.layers.includes(layer), `${layer} in ${body.worker.layers}`);
    }
    assert.equal(statSync(body.sockets.tpm).mode & 0o777, 0o600);
    assert.equal(statSync(join(body.sockets.tpm, '..')).mode & 0o777, 0o700);
    for (const path of [body.sockets.tpm, body.sockets.tcti, `${body.sockets.tcti}.ctrl`]) {
      const guest = await connectDoor(path);
      assert.equal(await exchange(guest, `through ${path}`), `through ${path}`);
      guest.end();
      await once(guest, 'close');
    }
    const [ticket] = manager.tickets;
    assert.deepEqual(ticket?.verbs, ['MANUFACTURE', 'COLD']);
    assert.equal(Buffer.from(ticket?.managerId ?? '').toString('hex'), MANAGER_ID);
    assert.equal(ticket?.isolation, 'sandbox');
    const stopped = await supervisor.call('POST', '/vtpms/web1/stop');
    assert.deepEqual([stopped.body.state, stopped.body.reason, stopped.body.worker], ['stopped', null, null]);
    assert.deepEqual(workers(), []);
  });

  it('never asks for a new TPM once one was made, and gives each power-on its own VM run', async () => {
    await supervisor.create('web1');
    const first = (await supervisor.call('POST', '/vtpms/web1/start')).body;
    await supervisor.call('POST', '/vtpms/web1/stop');
    const second = (await supervisor.call('POST', '/vtpms/web1/start')).body;
    assert.notEqual(second.vmRunId, first.vmRunId);
    assert.deepEqual(manager.tickets[1]?.verbs, ['COLD']);
    assert.equal(manager.tickets[1]?.expectedEpoch, 1n);
    await supervisor.call('POST', '/vtpms/web1/stop');
    manager.records.clear();
    const lost = await supervisor.call('POST', '/vtpms/web1/start');
    assert.equal(lost.body.error.code, 'corrupt');
    const verbs = manager.tickets.slice(1).map((ticket) => ticket.verbs);
    assert.ok(!verbs.flat().includes('MANUFACTURE'), 'no ticket lets a new one be made');
    assert.deepEqual(workers(), []);
  });

  it('asks the manager for an epoch only where the list is wrong about it', async () => {
    // Before its events are heard, no manager is known to be the one that was asked.
    await until(async () => (await supervisor.call('GET', '/health')).body.managerConnected);
    const { body: vtpm } = await supervisor.create('web1');
    const start = () => supervisor.call('POST', '/vtpms/web1/start');
    const epoch = async () => {
      const { body } = await start();
      await supervisor.call('POST', '/vtpms/web1/stop');
      return body.epoch;
    };
    assert.equal(await epoch(), 1);
    const before = manager.asked;
    assert.deepEqual([await epoch(), manager.asked], [2, before], 'the list knows');
    const record = manager.records.get(vtpm.id)!;
    // As after a restored backup.
    manager.records.set(vtpm.id, { ...record, epoch: 7 });
    assert.deepEqual([await epoch(), manager.asked], [8, before + 1]);
    assert.deepEqual(
      manager.tickets.map((ticket) => ticket.expectedEpoch),
      [0n, 1n, 2n, 7n],
    );
    manager.records.set(vtpm.id, { ...record, kind: 'retired', epoch: 9 });
    const { body } = await start();
    assert.equal(body.error.code, 'manager-refused');
    assert.match(body.error.message, /was retired/);
    assert.deepEqual(workers(), []);
    assert.equal((await supervisor.call('GET', '/vtpms/web1')).body.epoch, 8, 'nothing has happened');
  });

  it('puts another worker in the place of one that died, with the same connections and VM run', async () => {
    await supervisor.create('web1');
    const started = (await supervisor.call('POST', '/vtpms/web1/start')).body;
    const guest = await connectDoor(started.sockets.tpm);
    const other = await connectDoor(started.sockets.tcti);
    const ids = [await exchange(guest, 'who'), await exchange(other, 'who')];
    guest.write('crash');
    await until(async () => (await supervisor.call('GET', '/vtpms/web1')).body.epoch === 2);
    assert.deepEqual([await exchange(guest, 'who'), await exchange(other, 'who')], ids);
    await until(async () => (await supervisor.call('GET', '/vtpms/web1')).body.state === 'running');
    const { body } = await supervisor.call('GET', '/vtpms/web1');
    assert.deepEqual([body.vmRunId, body.epoch, body.reason], [started.vmRunId, 2, null]);
    assert.notEqual(body.worker.pid, started.worker.pid);
    const [first, second] = manager.tickets;
    assert.deepEqual(second?.verbs, ['RESUME']);
    assert.deepEqual(second?.vmRunId, first?.vmRunId);
    const late = await connectDoor(started.sockets.tpm);
    assert.notEqual(await exchange(late, 'who'), ids[0]);
    assert.equal((await supervisor.call('POST', '/vtpms/web1/stop')).body.reason, null);
  });

  it('says that the TPM is lost where no worker may go on, and starts it only when asked', async () => {
    await supervisor.create('web1', { autostart: true, verbs: ['MANUFACTURE', 'COLD'] });
    const { sockets, vmRunId } = (await supervisor.call('POST', '/vtpms/web1/start')).body;
    const guest = await connectDoor(sockets.tpm);
    assert.equal(await exchange(guest, 'x'), 'x');
    guest.write('crash');
    await until(async () => (await supervisor.call('GET', '/vtpms/web1')).body.state === 'lost');
    assert.match((await supervisor.call('GET', '/vtpms/web1')).body.reason, /exit status 7.*verb resume/);
    assert.equal(manager.tickets.length, 1, 'what answers failure has no identity');
    assert.equal(await exchange(guest, 'still connected'), 'still connected');
    await supervisor.end('SIGTERM');
    supervisor = await new SupervisorProcess(home, manifest, ['--log-format', 'json']).ready();
    const kept = (await supervisor.call('GET', '/vtpms/web1')).body;
    assert.deepEqual([kept.state, kept.vmRunId], ['crashed', vmRunId]);
    assert.equal((await supervisor.call('POST', '/vtpms/web1/start')).body.state, 'running');
  });

  it('waits where the image of the next worker is not allowed, and goes on when it is', async () => {
    await supervisor.create('web1');
    const { sockets } = (await supervisor.call('POST', '/vtpms/web1/start')).body;
    const guest = await connectDoor(sockets.tpm);
    const id = await exchange(guest, 'who');
    const message =
      'image-not-allowed: the worker image is not allowed; check it, then run: vtpmctl image allow';
    manager.refuse = { reason: 'image-not-allowed', message };
    guest.write('crash');
    const view = async () => (await supervisor.call('GET', '/vtpms/web1')).body;
    const isToldWhy = async () => /vtpmctl image allow/.test((await view()).reason);
    await until(isToldWhy);
    assert.equal((await view()).state, 'restarting');
    manager.refuse = undefined;
    await until(async () => (await view()).state === 'running');
    assert.equal((await view()).epoch, 2);
    assert.equal(await exchange(guest, 'who'), id);
    // An upgrade and a stop do not wait until the next try.
    manager.refuse = { reason: 'image-not-allowed', message };
    guest.write('crash');
    await until(isToldWhy);
    assert.equal((await supervisor.call('POST', '/upgrade')).status, 200);
    assert.equal((await view()).state, 'restarting');
    assert.equal((await supervisor.call('POST', '/vtpms/web1/stop')).body.state, 'stopped');
    assert.deepEqual(workers(), []);
  });

  it('goes on after as many refusals as there are, where it is not the vTPM that is refused', async () => {
    await supervisor.create('web1');
    const { sockets } = (await supervisor.call('POST', '/vtpms/web1/start')).body;
    const guest = await connectDoor(sockets.tpm);
    const id = await exchange(guest, 'who');
    manager.status = 'shutting-down';
    guest.write('crash');
    await until(() => /shutting.down/.test(supervisor.stderr));
    manager.refuse = { reason: 'rate-limited', message: 'rate-limited: too many Loads at once' };
    manager.status = 'ready';
    // One more than a worker gets that fails by itself.
    await until(() => manager.tickets.length >= 8);
    manager.refuse = undefined;
    await until(async () => (await supervisor.call('GET', '/vtpms/web1')).body.state === 'running');
    assert.equal(await exchange(guest, 'who'), id);
  });

  it('bounds how often a worker may die in a row, whatever it says that it did before', async () => {
    await supervisor.create('web1');
    const { sockets } = (await supervisor.call('POST', '/vtpms/web1/start')).body;
    const guest = await connectDoor(sockets.tpm);
    const id = await exchange(guest, 'who');
    const view = async () => (await supervisor.call('GET', '/vtpms/web1')).body;
    const isDelayed = async () => /restarted too often/.test((await view()).reason);
    for (let epoch = 1; !(await isDelayed()); epoch++) {
      assert.ok(epoch <= 40, 'it goes on and on');
      await exchange(guest, 'rise');
      guest.write('crash');
      await until(async () => {
        const now = await view();
        return (now.state === 'running' && now.epoch > epoch) || (await isDelayed());
      });
    }
    assert.ok(manager.tickets.length > 10, 'the first worker, and ten at once');
    assert.equal((await view()).state, 'restarting');
    await until(async () => (await view()).state === 'running');
    assert.equal(await exchange(guest, 'who'), id);
  });

  it('gives a worker up that dies whatever is tried, and closes its doors', async () => {
    await supervisor.create('web1');
    const { sockets } = (await supervisor.call('POST', '/vtpms/web1/start')).body;
    const guest = await connectDoor(sockets.tpm);
    guest.on('error', () => {});
    manager.refuse = { reason: 'internal', message: 'not today' };
    guest.write('crash');
    await once(guest, 'close');
    await until(async () => (await supervisor.call('GET', '/vtpms/web1')).body.state === 'crashed');
    assert.match((await supervisor.call('GET', '/vtpms/web1')).body.reason, /not today/);
    assert.equal(manager.tickets.length, 6, 'the first worker, and five that tried');
    await assert.rejects(connectDoor(sockets.tpm));
    manager.refuse = undefined;
    await supervisor.end('SIGTERM');
    supervisor = await new SupervisorProcess(home, manifest, ['--log-format', 'json']).ready();
    assert.equal((await supervisor.call('GET', '/vtpms/web1')).body.state, 'crashed');
    const again = await supervisor.call('POST', '/vtpms/web1/start');
    assert.equal(again.body.state, 'running', JSON.stringify(again.body));
  });

  it('makes a few workers at a time where many died at once, and each of them in the end', async () => {
    const names = Array.from({ length: 24 }, (_, index) => `web${index}`);
    const started = await Promise.all(
      names.map(async (name) => {
        await supervisor.create(name);
        return (await supervisor.call('POST', `/vtpms/${name}/start`)).body;
      }),
    );
    let comingUp = 0;
    let most = 0;
    let greetAll: () => void = () => undefined;
    const isFull = new Promise<void>((resolve) => (greetAll = resolve));
    manager.beforeGreeting = async () => {
      most = Math.max(most, ++comingUp);
      if (comingUp === 4) greetAll();
      await isFull;
      // Time for those who do not wait for their turn.
      await supervisor.call('GET', '/health');
      comingUp--;
    };
    const view = async (name: string) => (await supervisor.call('GET', `/vtpms/${name}`)).body;
    for (const { worker } of started) process.kill(worker.pid, 'SIGKILL');
    await until(async () => {
      const all = (await supervisor.call('GET', '/vtpms')).body.vtpms;
      // biome-ignore lint/suspicious/noExplicitAny: as the answers are.
      return all.every(({ state, epoch }: any) => state === 'running' && epoch === 2);
    });
    assert.equal(most, 4);
    // Those that wait for their turn are stopped at once.
    manager.beforeGreeting = () => new Promise(() => undefined);
    for (const name of names) process.kill((await view(name)).worker.pid, 'SIGKILL');
    await until(async () => (await view('web23')).state === 'restarting');
    assert.equal((await supervisor.call('POST', '/vtpms/web23/stop')).body.state, 'stopped');
  });

  it('stops a vTPM while no worker is there', async () => {
    await supervisor.create('web1');
    const { sockets } = (await supervisor.call('POST', '/vtpms/web1/start')).body;
    const guest = await connectDoor(sockets.tpm);
    guest.on('error', () => {});
    await manager.stop();
    guest.write('crash');
    await until(async () => (await supervisor.call('GET', '/vtpms/web1')).body.state === 'restarting');
    assert.equal((await supervisor.call('POST', '/vtpms/web1/stop')).body.state, 'stopped');
    assert.deepEqual(workers(), []);
    await manager.start();
    assert.equal((await supervisor.call('POST', '/vtpms/web1/start')).body.state, 'running');
  });

  it('leaves no worker behind when it is killed, and its successor does not restart what ran (I-3)', async () => {
    await supervisor.create('web1', { autostart: true });
    await supervisor.create('dev1', { isolation: 'none' });
    await supervisor.call('POST', '/vtpms/web1/start');
    const bare = (await supervisor.call('POST', '/vtpms/dev1/start')).body;
    assert.deepEqual(
      bare.worker.layers.filter((layer: string) => layer.startsWith('namespace')),
      [],
    );
    const before = [...workers(), processId(bare.worker.pid)].filter((id) => id !== undefined);
    assert.ok(before.length >= 2);
    await supervisor.end('SIGKILL');
    await until(() => !before.some(isAlive));
    supervisor = await new SupervisorProcess(home, manifest, ['--log-format', 'json']).ready();
    const { body } = await supervisor.call('GET', '/vtpms');
    assert.deepEqual(
      body.vtpms.map((vtpm: { name: string; state: string }) => [vtpm.name, vtpm.state]),
      [
        ['web1', 'crashed'],
        ['dev1', 'crashed'],
      ],
    );
  });

  it('ends workers that an earlier supervisor left before it does anything else', async () => {
    await supervisor.create('web1');
    const { worker } = (await supervisor.call('POST', '/vtpms/web1/start')).body;
    // Stopped processes do not notice that their supervisor is gone; PR_SET_PDEATHSIG ends them all the same, so
    // a process of the image that has no such parent stands in for one that was missed.
    process.kill(worker.pid, 'SIGSTOP');
    const images = supervisor.paths.supervisor.images;
    const root = join(images, readdirSync(images)[0] ?? '', 'root');
    const libc = '/lib/x86_64-linux-gnu';
    const command = bareCommand({
      root,
      node: '/usr/bin/node',
      loader: readdirSync(root).includes('lib64')
        ? '/lib64/ld-linux-x86-64.so.2'
        : '/lib/ld-linux-aarch64.so.1',
      libraries: readdirSync(join(root, 'lib')).includes('x86_64-linux-gnu')
        ? libc
        : '/lib/aarch64-linux-gnu',
      argv: ['-e', 'console.log(1);setInterval(()=>{},1000)', '--'],
      env: {},
    });
    const orphan = spawn(command.file, command.args, { stdio: ['ignore', 'pipe', 'ignore'] });
    await once(orphan.stdout, 'data');
    await supervisor.end('SIGKILL');
    const next = new SupervisorProcess(home, manifest, ['--log-format', 'json']);
    const [, signal] = orphan.signalCode ? [0, orphan.signalCode] : await once(orphan, 'exit');
    supervisor = await next.ready();
    assert.equal(signal, 'SIGKILL');
    assert.deepEqual(workers(), []);
  });

  it('hands a worker a new manager link for as long as it takes', async () => {
    await supervisor.create('web1');
    const { sockets } = (await supervisor.call('POST', '/vtpms/web1/start')).body;
    const guest = await connectDoor(sockets.tpm);
    for (let round = 0; round < 2; round++) {
      await manager.stop();
      await until(() => supervisor.stderr.split('the worker holds what must be saved').length === round + 2);
      assert.equal(await exchange(guest, 'still there'), 'still there');
      await manager.start();
      await until(() => supervisor.stderr.split('connected to the manager again').length === round + 2);
    }
    await until(async () => (await supervisor.call('GET', '/health')).body.managerConnected);
    assert.equal((await supervisor.call('POST', '/vtpms/web1/stop')).body.reason, null);
  });

  it('tells why a start failed, and leaves nothing running', async () => {
    await supervisor.create('web1');
    manager.refuse = { reason: 'image-not-allowed', message: 'allow the image first' };
    const refused = await supervisor.call('POST', '/vtpms/web1/start');
    assert.deepEqual([refused.status, refused.body.error.code], [403, 'image-not-allowed']);
    assert.match(refused.body.error.message, /allow the image first/);
    manager.refuse = undefined;
    manager.status = 'locked';
    assert.equal((await supervisor.call('POST', '/vtpms/web1/start')).body.error.code, 'locked');
    manager.status = 'ready';
    await manager.stop();
    assert.equal((await supervisor.call('POST', '/vtpms/web1/start')).body.error.code, 'manager-unreachable');
    assert.deepEqual(workers(), []);
    assert.equal((await supervisor.call('GET', '/vtpms/web1')).body.state, 'stopped');
    await manager.start();
    assert.equal((await supervisor.call('POST', '/vtpms/web1/start')).body.state, 'running');
  });

  it('kills a worker that does not stop, or that breaks the protocol', async () => {
    await supervisor.end('SIGTERM');
    const flags = ['--log-format', 'json', '--worker-stop-timeout', '300'];
    supervisor = await new SupervisorProcess(home, manifest, flags).ready();
    await supervisor.create('web1');
    const started = (await supervisor.call('POST', '/vtpms/web1/start')).body;
    const guest = await connectDoor(started.sockets.tpm);
    guest.on('error', () => {});
    assert.equal(await exchange(guest, 'hang'), 'hang');
    const stopped = (await supervisor.call('POST', '/vtpms/web1/stop')).body;
    assert.equal(stopped.state, 'stopped');
    assert.match(stopped.reason, /did not stop within 300 ms/);
    assert.deepEqual(workers(), []);
    await supervisor.call('POST', '/vtpms/web1/start');
    const other = await connectDoor(started.sockets.tpm);
    other.on('error', () => {});
    other.write('babble');
    await until(() => supervisor.stderr.includes('broke the protocol'));
    await until(async () => (await supervisor.call('GET', '/vtpms/web1')).body.epoch === 3);
  });

  it('does one operation per vTPM at a time and refuses what does not fit its state', async () => {
    await supervisor.create('web1');
    const both = await Promise.all([
      supervisor.call('POST', '/vtpms/web1/start'),
      supervisor.call('POST', '/vtpms/web1/start'),
    ]);
    assert.deepEqual(both.map(({ status }) => status).sort(), [200, 409]);
    assert.equal(both.find(({ status }) => status === 409)?.body.error.code, 'busy');
    assert.equal((await supervisor.call('POST', '/vtpms/web1/start')).body.error.code, 'already-running');
    assert.equal((await supervisor.call('DELETE', '/vtpms/web1')).body.error.code, 'not-stopped');
    await supervisor.call('POST', '/vtpms/web1/stop');
    assert.equal((await supervisor.create('web1')).body.error.code, 'name-taken');
    assert.equal((await supervisor.call('DELETE', '/vtpms/web1')).status, 200);
    assert.equal((await supervisor.call('GET', '/vtpms/web1')).status, 404);
  });

  it('refuses bad input by name (I-10)', async () => {
    const delegated = await supervisor.create('ok');
    for (const [what, change] of Object.entries({
      name: { name: '../etc' },
      id: { id: 'x' },
      isolation: { isolation: 'jail' },
      unknown: { color: 'red' },
      delegation: { delegation: 'AAAA' },
      'another vTPM': { id: delegated.body.id.replace(/^./, '0') },
    })) {
      const { status, body } = await supervisor.create('web1', change);
      assert.deepEqual([what, status, body.error?.code], [what, 400, 'bad-request']);
    }
    assert.equal((await supervisor.call('POST', '/vtpms', '{')).status, 400);
    assert.equal((await supervisor.call('POST', '/vtpms', `"${'x'.repeat(4_000_000)}"`)).status, 400);
    assert.equal((await supervisor.call('GET', '/vtpms/%ff')).status, 400);
    assert.equal((await supervisor.call('PUT', '/health')).status, 400);
    assert.equal((await supervisor.call('GET', '/vtpms/none')).body.error.code, 'unknown-vtpm');
  });

  it('is refused where another one holds the installation', async () => {
    const second = new SupervisorProcess(home, manifest);
    assert.equal(await second.end(), 1);
    assert.match(second.stderr, /\[in-use\]/);
    assert.equal((await supervisor.call('GET', '/health')).status, 200);
  });

  it('does not take a lost or damaged list for a first start (I-9)', async () => {
    await supervisor.create('web1');
    await supervisor.end('SIGTERM');
    const { vtpms } = supervisor.paths.supervisor;
    const content = readFileSync(vtpms, 'utf8');
    for (const damage of ['lost', 'damaged'] as const) {
      rmSync(vtpms, { force: true });
      if (damage === 'damaged') writeFileSync(vtpms, content.replace('web1', 'web2'));
      const refused = new SupervisorProcess(home, manifest);
      assert.equal(await refused.end(), 1);
      assert.match(refused.stderr, /\[corrupt\]/);
    }
  });

  it('starts what is marked for it when the manager comes, and stops all on SIGTERM', async () => {
    await supervisor.create('web1', { autostart: true });
    await supervisor.create('web2');
    await supervisor.end('SIGTERM');
    await manager.stop();
    supervisor = await new SupervisorProcess(home, manifest, ['--log-format', 'json']).ready();
    assert.equal((await supervisor.call('GET', '/vtpms/web1')).body.state, 'stopped');
    await manager.start();
    await until(async () => (await supervisor.call('GET', '/vtpms/web1')).body.state === 'running');
    assert.equal((await supervisor.call('GET', '/vtpms/web2')).body.state, 'stopped');
    assert.equal(await supervisor.end('SIGTERM'), 0);
    assert.deepEqual(workers(), []);
    supervisor = await new SupervisorProcess(home, manifest, ['--log-format', 'json']).ready();
    assert.notEqual((await supervisor.call('GET', '/vtpms/web1')).body.state, 'crashed');
  });
});
