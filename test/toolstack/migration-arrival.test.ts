import assert from 'node:assert/strict';
import { randomUUID } from 'node:crypto';
import { existsSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { decode } from 'vtpm-proto';
import { type MigrationWorld, withMigrationWorlds } from './migration-world.js';
import { connectDoor, exchange, until, workersOf } from './supervisor-fixture.js';

/** Prelude of a supervisor whose disk is full while that file is there. */
const writesNothingWhile = (full: string): string => `import { existsSync } from 'node:fs';
globalThis[Symbol.for('vtpm.barrier')] = (name) => {
  if (name === 'journal.written' && existsSync(${JSON.stringify(full)})) throw new Error('ENOSPC: no space left on device');
};`;

describe('a vTPM that comes, as its supervisor sees it', function () {
  this.timeout(60_000);
  let world: MigrationWorld;
  withMigrationWorlds((made) => {
    world = made;
  });

  it('makes an entry and a worker whose Load waits, and shows doors when it serves', async () => {
    const event = world.incoming();
    const load = world.holdLoads(event);
    world.manager.emit(event);
    await load.begun;
    await world.said('accept', event);
    const waiting = await world.view();
    assert.deepEqual([waiting.state, waiting.id, waiting.vmUuid], ['arriving', event.id, event.vmUuid]);
    assert.ok(!existsSync(waiting.sockets.tpm));
    const [ticket] = world.manager.tickets;
    assert.deepEqual([ticket!.verbs, ticket!.expectedEpoch], [['RESUME'], 7n]);
    assert.equal(Buffer.from(ticket!.vmRunId).toString('hex'), event.vmRunId.replaceAll('-', ''));
    for (const verb of ['start', 'stop']) {
      const { status, body } = await world.supervisor.call('POST', `/vtpms/web1/${verb}`);
      assert.equal(status, 409);
      assert.equal(
        body.error.message,
        'vTPM web1 is being taken in from other; wait for that: vtpmctl migrate status web1',
      );
    }
    load.commit();
    await world.becomes('running');
    const now = await world.view();
    assert.deepEqual([now.epoch, now.migration, now.movedTo], [8, null, null]);
    const guest = await connectDoor(now.sockets.tpm);
    assert.equal(await exchange(guest, 'here'), 'here');
    // It is as any other: it goes on, it is stopped, it is started, and never made anew.
    guest.write('crash');
    await until(() => world.manager.tickets.length === 2);
    await world.becomes('running');
    world.manager.beforeLoad = undefined;
    await world.supervisor.call('POST', '/vtpms/web1/stop');
    assert.equal((await world.supervisor.call('POST', '/vtpms/web1/start')).body.state, 'running');
    assert.deepEqual(world.manager.tickets.at(-1)!.verbs, ['COLD']);
  });

  it('the delegation that it comes with lets nobody make another TPM of its id', async () => {
    const event = world.incoming({ mode: 'OFFLINE' });
    world.manager.emit(event);
    await world.said('accept', event);
    const { vtpms } = JSON.parse(readFileSync(world.supervisor.paths.supervisor.vtpms, 'utf8')) as {
      vtpms: { delegation: string }[];
    };
    const { verbs } = decode('Delegation', Buffer.from(vtpms[0]!.delegation, 'base64'));
    assert.deepEqual(verbs, ['COLD', 'RESUME']);
  });

  it('leaves nothing of one that is aborted', async () => {
    const event = world.incoming();
    const load = world.holdLoads(event);
    world.manager.emit(event);
    await world.said('accept', event);
    load.abort();
    world.decided(event, 'ABORT');
    await world.isGone();
    assert.deepEqual(workersOf(world.supervisor.paths), []);
    world.manager.refuse = undefined;
    // The name is free.
    assert.equal((await world.supervisor.create('web1')).status, 201);
  });

  it('takes in one that is stopped, which stays so', async () => {
    const event = world.incoming({ mode: 'OFFLINE' });
    world.manager.emit(event);
    await world.said('accept', event);
    assert.equal(await world.state(), 'arriving');
    world.manager.records.set(event.id, { vmUuid: event.vmUuid, kind: 'live', epoch: 8, generation: 9 });
    world.decided(event, 'COMMIT');
    await world.becomes('stopped');
    assert.equal(world.manager.tickets.length, 0);
    assert.equal((await world.supervisor.call('POST', '/vtpms/web1/start')).body.state, 'running');
  });

  it('takes back one that was here, under the name that it has here, with the doors that it has by now', async () => {
    const vtpm = await world.running();
    const begun = await world.order(vtpm);
    await world.frozen(begun);
    begun.call.end('COMMITTED');
    await begun.lines.ended;
    const gone = world.manager.records.get(vtpm.id)!;
    world.manager.records.set(vtpm.id, { ...gone, kind: 'moved' });
    for (const verdict of ['ABORT', 'COMMIT'] as const) {
      const ids = { id: vtpm.id, vmUuid: vtpm.vmUuid, mode: 'OFFLINE' };
      const weaker = world.incoming({ ...ids, ...world.described({ doors: ['mssim'] }) });
      world.manager.emit(weaker);
      await world.said('refuse', weaker);
      assert.equal(world.answers.at(-1)!.code, 'migration-refused');
      const now = { name: 'elsewhere', doors: ['tcti'], startup: 'none', isolation: 'none' };
      const event = world.incoming({ ...ids, ...world.described(now) });
      world.manager.emit(event);
      await world.said('accept', event);
      assert.equal(await world.state(), 'arriving');
      if (verdict === 'COMMIT') world.manager.records.set(vtpm.id, { ...gone, kind: 'live', epoch: 8 });
      world.decided(event, verdict);
      await world.becomes(verdict === 'COMMIT' ? 'stopped' : 'moved');
    }
    const { body } = await world.supervisor.call('POST', '/vtpms/web1/start');
    assert.deepEqual(
      [body.state, body.doors, body.startup, body.isolation],
      ['running', ['tcti'], 'none', 'sandbox'],
    );
    assert.ok(body.sockets.tcti.endsWith('/web1/tcti.sock') && existsSync(body.sockets.tcti));
    assert.ok(!existsSync(vtpm.sockets.tpm));
  });

  it('refuses by name, before anything stops, what it does not take', async () => {
    await world.supervisor.create('taken');
    const { body: other } = await world.supervisor.create('other');
    const cases: readonly [Record<string, unknown>, string][] = [
      [world.described({ name: 'taken' }), 'name-taken'],
      [{ id: other.id }, 'name-taken'],
      [{ description: 'no JSON' }, 'bad-request'],
      [world.described({ format: 2 }), 'newer-format'],
      [world.described({ doors: ['window'] }), 'bad-request'],
      [world.described({ name: '../../etc' }), 'bad-request'],
      [world.described({ name: '--help' }), 'bad-request'],
      [world.described({ autostart: 'yes' }), 'bad-request'],
      // All that follow would be refused by the making of their entry, which a dry run does not come to.
      [world.described({ name: randomUUID() }), 'bad-request'],
      [world.described({ isolation: 'vm', doors: ['control'] }), 'bad-request'],
      [world.described({ isolation: 'vm' }), 'missing-package'],
    ];
    for (const [change, code] of cases) {
      for (const dryRun of [true, false]) {
        const event = world.incoming({ ...change, dryRun });
        world.manager.emit(event);
        await world.said('refuse', event);
        assert.equal(world.answers.at(-1)!.code, code, world.answers.at(-1)!.message);
      }
    }
    assert.equal((await world.supervisor.call('GET', '/vtpms')).body.vtpms.length, 2);
    const dry = world.incoming({ dryRun: true });
    world.manager.emit(dry);
    await world.said('accept', dry);
    assert.equal((await world.supervisor.call('GET', '/vtpms')).body.vtpms.length, 2);
  });

  it('refuses a live one, a dry run of it too, where its manager does not allow the image of its workers', async () => {
    world.manager.images.clear();
    for (const dryRun of [true, false]) {
      const event = world.incoming({ dryRun });
      world.manager.emit(event);
      await world.said('refuse', event);
      const { code, message } = world.answers.at(-1)!;
      assert.equal(code, 'image-not-allowed');
      assert.match(message!, /run there: vtpmctl image allow [0-9a-f]{64}$/);
    }
    assert.deepEqual(world.manager.tickets, []);
    assert.equal((await world.supervisor.call('GET', '/vtpms')).body.vtpms.length, 0);
    const stopped = world.incoming({ mode: 'OFFLINE' });
    world.manager.emit(stopped);
    await world.said('accept', stopped);
  });

  it('refuses a live one, a dry run of it too, where this machine does not give its sandbox a layer', async () => {
    await world.restart([], undefined, ['setpriv', '--bounding-set=-sys_admin', '--inh-caps=-sys_admin']);
    // Where no worker has that layer, none is missing.
    const waived = (process.env.VTPM_WAIVE_LAYERS ?? '').split(',');
    const isMissing = process.getuid?.() === 0 && !waived.includes('uid');
    for (const dryRun of [true, false]) {
      const event = world.incoming({ dryRun });
      world.manager.emit(event);
      await world.said(isMissing ? 'refuse' : 'accept', event);
      if (isMissing) assert.equal(world.answers.at(-1)!.code, 'layer-missing');
    }
  });

  it('takes none, or those that it knows, where it is set so', async () => {
    for (const policy of ['none', 'known']) {
      await world.restart(['--accept-migrations', policy]);
      const event = world.incoming();
      world.manager.emit(event);
      await world.said('refuse', event);
      assert.equal(world.answers.at(-1)!.code, 'migration-refused');
    }
  });

  it('is not told by another host to protect a vTPM less, where it is not set so', async () => {
    const weaker: readonly [string, Record<string, unknown>][] = [
      ['isolation-none', { isolation: 'none' }],
      ['mssim', { doors: ['mssim'] }],
      ['plain', { stateBlobs: 'plain' }],
    ];
    for (const [name, change] of weaker) {
      for (const dryRun of [true, false]) {
        const event = world.incoming({ ...world.described(change), mode: 'OFFLINE', dryRun });
        world.manager.emit(event);
        await world.said('refuse', event);
        const { code, message } = world.answers.at(-1)!;
        assert.deepEqual(
          [code, message?.includes(`put ${name} into migrations-may`)],
          ['migration-refused', true],
        );
      }
    }
    assert.equal((await world.supervisor.call('GET', '/vtpms')).body.vtpms.length, 0);
    await world.restart(['--migrations-may', 'plain, isolation-none,mssim']);
    for (const [name, change] of weaker) {
      const event = world.incoming({ ...world.described({ ...change, name }), mode: 'OFFLINE' });
      world.manager.emit(event);
      await world.said('accept', event);
    }
    writeFileSync(world.supervisor.paths.config, JSON.stringify({ isolation: 'none' }));
    await world.restart();
    const event = world.incoming({
      ...world.described({ isolation: 'none', name: 'as-here' }),
      mode: 'OFFLINE',
    });
    world.manager.emit(event);
    await world.said('accept', event);
  });

  it('hears of what came while it was away', async () => {
    await world.supervisor.end('SIGKILL');
    const event = world.incoming({ mode: 'OFFLINE' });
    world.manager.migrations.set(event.migration, { state: 'preparing', incoming: event });
    world.supervisor = await world.start();
    await world.said('accept', event);
    assert.equal(await world.state(), 'arriving');
  });

  it('is here when its VM has brought it, though the list cannot be written then', async () => {
    const full = join(dirname(world.manifest), 'full');
    await world.restart([], writesNothingWhile(full));
    const event = world.incoming({ ...world.described({ doors: ['control'] }), mode: 'VMM' });
    world.manager.emit(event);
    await world.said('accept', event);
    const { state, sockets, worker } = await world.view();
    assert.equal(state, 'arriving');
    const vmm = await connectDoor(sockets.control);
    const load = world.holdLoads(event);
    assert.equal(await exchange(vmm, 'init'), 'init');
    await load.begun;
    writeFileSync(full, '');
    load.commit();
    await world.becomes('running');
    const now = await world.view();
    assert.deepEqual([now.worker.pid, now.migration?.id], [worker.pid, event.migration]);
    assert.equal(await exchange(vmm, 'here'), 'here');
    rmSync(full);
    world.decided(event, 'COMMIT');
    await until(async () => (await world.view()).migration === null);
    const { state: still, vmRunId, epoch } = await world.view();
    assert.deepEqual([still, vmRunId, epoch], ['running', event.vmRunId, 8]);
    assert.equal(await exchange(vmm, 'still'), 'still');
  });

  it('is refused where its supervisor ends while it waits for its VM: by it, by the next where the manager is away', async () => {
    for (const isAway of [false, true]) {
      const event = world.incoming({ ...world.described({ doors: ['control'] }), mode: 'VMM' });
      world.manager.emit(event);
      await world.said('accept', event);
      world.manager.migrations.set(event.migration, { state: 'preparing', mode: 'VMM' });
      if (isAway) await world.manager.stop();
      assert.equal(await world.supervisor.end('SIGTERM'), 0);
      assert.equal(world.answers.at(-1)!.verb, isAway ? 'accept' : 'refuse');
      if (isAway) await world.manager.start();
      world.supervisor = await world.start();
      await world.said('refuse', event);
      assert.match(world.answers.at(-1)!.message!, /the supervisor that was to serve its VMM has ended/);
      world.decided(event, 'ABORT');
      await world.isGone();
    }
  });

  it('a worker that is lost before the decision ends the migration', async () => {
    const event = world.incoming();
    const load = world.holdLoads(event);
    world.manager.emit(event);
    await load.begun;
    await world.said('accept', event);
    const [worker] = workersOf(world.supervisor.paths);
    process.kill(worker!.pid, 'SIGKILL');
    await until(() => world.answers.some(({ verb }) => verb === 'refuse' || verb === 'cancel'));
    world.decided(event, 'ABORT');
    await world.isGone();
  });

  it('a worker that is lost behind the decision is followed by one that goes on', async () => {
    const event = world.incoming();
    const load = world.holdLoads(event);
    world.manager.emit(event);
    await world.said('accept', event);
    await load.begun;
    world.manager.beforeLoad = undefined;
    const [worker] = workersOf(world.supervisor.paths);
    world.manager.records.set(event.id, {
      vmUuid: event.vmUuid,
      kind: 'live',
      epoch: 8,
      generation: 9,
      isSuspended: true,
    });
    world.manager.migrations.delete(event.migration);
    process.kill(worker!.pid, 'SIGKILL');
    await world.becomes('running');
    const { verbs, vmRunId, expectedEpoch } = world.manager.tickets.at(-1)!;
    assert.deepEqual([verbs, expectedEpoch], [['RESUME'], 8n]);
    assert.equal(Buffer.from(vmRunId).toString('hex'), event.vmRunId.replaceAll('-', ''));
  });

  describe("I-3: a supervisor that is killed does what the manager's record says", () => {
    // At every step: test/long/supervisor-migration.
    it('that it has come', () => world.killArriving('migrate.destination.waiting', 'COMMIT'));
    it('that it has not', () => world.killArriving('migrate.destination.waiting', 'ABORT'));
  });
});
