import assert from 'node:assert/strict';
import { randomUUID } from 'node:crypto';
import { existsSync, rmSync, writeFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import grpc from '@grpc/grpc-js';
import { testOrder } from './migration-fixture.js';
import { type MigrationWorld, withMigrationWorlds } from './migration-world.js';
import { connectDoor, exchange, until, workersOf } from './supervisor-fixture.js';

/**
 * Prelude of a supervisor: its descendants before the worker is ended, and which of them can still run behind that. While the file
 * `slow` is there, nothing that it kills ends.
 */
const tellsWhoIsLeft = (
  slow: string,
): string => `import { existsSync, readFileSync, writeSync } from 'node:fs';
const kill = process.kill;
process.kill = (pid, signal) => existsSync(${JSON.stringify(slow)}) || kill.call(process, pid, signal);
const read = (path) => { try { return readFileSync(path, 'utf8'); } catch { return ''; } };
const below = (pid) =>
  read('/proc/' + pid + '/task/' + pid + '/children').split(' ').filter(Boolean).flatMap((one) => [one, ...below(one)]);
const runs = (pid) => !['', 'Z', 'X'].includes((/\\) (.)/.exec(read('/proc/' + pid + '/stat')) ?? ['', ''])[1]);
let workers = [];
globalThis[Symbol.for('vtpm.barrier')] = (name) => {
  if (name === 'migrate.source.reaping') workers = below(process.pid);
  if (name === 'migrate.source.reaped') writeSync(2, 'left: ' + workers.filter(runs).length + ' of ' + workers.length + '\\n');
};`;

describe('a vTPM that leaves, as its supervisor sees it', function () {
  this.timeout(60_000);
  let world: MigrationWorld;
  withMigrationWorlds((made) => {
    world = made;
  });

  it('ends the worker when it is frozen and says so then, keeps its guests, and lets go when it has gone', async () => {
    const vtpm = await world.running();
    const guest = await connectDoor(vtpm.sockets.tpm);
    assert.equal(await exchange(guest, 'one'), 'one');
    const begun = await world.order(vtpm);
    begun.call.say('CONNECTING');
    await begun.lines.phase('CONNECTING');
    assert.equal(await world.state(), 'running');
    const { error: busy } = (await world.supervisor.call('POST', '/vtpms/web1/stop')).body;
    assert.deepEqual(
      [busy.code, busy.message],
      ['busy', 'vTPM web1 is being migrated to other; wait for that, or: vtpmctl migrate cancel web1'],
    );
    begun.call.say('FREEZING');
    begun.call.say('FROZEN');
    await begun.call.heard('reaped');
    assert.deepEqual(workersOf(world.supervisor.paths), [], 'nothing of it runs when that is said');
    assert.equal(await world.state(), 'migrating');
    assert.ok(!guest.destroyed);
    const closed = new Promise((resolve) => guest.once('close', resolve));
    begun.call.say('DECIDING', { bytesSent: 7n, bytesTotal: 7n, downtimeUs: 5n });
    await begun.lines.phase('DECIDING');
    assert.deepEqual((await world.supervisor.call('DELETE', '/vtpms/web1/migrate')).body, {
      cancelled: false,
    });
    begun.call.end('COMMITTED', { downtimeUs: 9n, message: '' });
    const last = await begun.lines.phase('COMMITTED');
    assert.deepEqual([last.downtimeUs, last.phase], [9, 'COMMITTED']);
    const { state: now, movedTo, movedAt, migration, sockets } = await world.view();
    assert.deepEqual([now, movedTo, migration, sockets.tpm], ['moved', 'other', null, null]);
    assert.equal(await begun.lines.ended, 200);
    await closed;
    assert.ok(!existsSync(vtpm.sockets.tpm));
    for (const [method, verb] of [
      ['POST', 'start'],
      ['POST', 'stop'],
      ['DELETE', 'migrate'],
    ] as const) {
      const { status, body } = await world.supervisor.call(method, `/vtpms/web1/${verb}`);
      assert.deepEqual([status, body.error.code], [409, 'moved']);
      assert.ok(body.error.message.startsWith(`vTPM web1 lives on other since ${movedAt}: use it there`));
    }
    await world.restart();
    assert.equal(await world.state(), 'moved');
    assert.equal((await world.supervisor.call('DELETE', '/vtpms/web1')).status, 200);
  });

  it('I-3: says that the worker has ended when none of its processes is left, and goes on no sooner', async () => {
    const slow = join(dirname(world.manifest), 'slow');
    await world.restart([], tellsWhoIsLeft(slow));
    const vtpm = await world.running();
    const begun = await world.order(vtpm);
    await world.frozen(begun);
    await until(() => world.supervisor.stderr.includes('left: '));
    assert.match(world.supervisor.stderr, /left: 0 of [1-9]/);
    begun.call.end('ABORTED');
    await begun.lines.ended;
    // The manager gives it up before it hears.
    writeFileSync(slow, '');
    const again = await world.order(vtpm);
    for (const phase of ['FREEZING', 'FROZEN'] as const) again.call.say(phase);
    again.call.end('ABORTED');
    await again.call.closed;
    const { state, migration } = await world.view();
    rmSync(slow);
    assert.deepEqual([state, migration !== null], ['migrating', true]);
    await again.lines.ended;
    assert.equal(await world.state(), 'running');
    assert.deepEqual(world.supervisor.stderr.match(/left: 0/g)?.length, 2);
  });

  it('has another worker go on with the same guests where it is aborted', async () => {
    const vtpm = await world.running();
    const guest = await connectDoor(vtpm.sockets.tpm);
    await exchange(guest, 'one');
    const begun = await world.order(vtpm);
    await world.frozen(begun);
    const answered = exchange(guest, 'two');
    begun.call.end('ABORTED', { reason: 'peer-platform', message: 'its PCRs are not approved' });
    const last = await begun.lines.phase('ABORTED');
    assert.equal(last.reason, 'peer-platform');
    assert.equal(await answered, 'two');
    assert.equal(await world.state(), 'running');
    assert.deepEqual(world.manager.tickets.at(-1)?.verbs, ['RESUME']);
    assert.equal((await world.view()).migration, null);
    // And is as good as new.
    const again = await world.order(vtpm);
    await world.frozen(again);
    again.call.end('ABORTED');
    await again.lines.ended;
    assert.equal(await exchange(guest, 'three'), 'three');
  });

  it('changes nothing where it is refused, aborted before the freeze, or a dry run', async () => {
    const vtpm = await world.running();
    const before = workersOf(world.supervisor.paths);
    const refused = testOrder(vtpm, 'LIVE');
    const refusing = world.supervisor.call('POST', '/vtpms/web1/migrate', refused.body);
    (await world.toolstack.next()).refuse(grpc.status.NOT_FOUND, 'unknown-peer', 'no such host');
    const answer = await refusing;
    assert.deepEqual(answer.body.error, { code: 'unknown-peer', message: 'no such host' });
    assert.equal((await world.view()).migration, null);
    const aborted = await world.order(vtpm);
    aborted.call.end('ABORTED', { reason: 'peer-unreachable' });
    await aborted.lines.phase('ABORTED');
    const dry = testOrder(vtpm, 'LIVE', true);
    const lines = world.lines(dry);
    const call = await world.toolstack.next();
    call.say('CONNECTING');
    call.end('PREPARED', { checks: [{ name: 'platform', detail: 'approved' }] });
    assert.deepEqual((await lines.phase('PREPARED')).checks, [{ name: 'platform', detail: 'approved' }]);
    await lines.ended;
    assert.deepEqual([(await world.view()).migration, await world.state()], [null, 'running']);
    assert.deepEqual(workersOf(world.supervisor.paths), before);
  });

  it('refuses an order for another vTPM, another state, or none, and one that is forged', async () => {
    const vtpm = await world.running();
    const post = (body: object) => world.supervisor.call('POST', '/vtpms/web1/migrate', body);
    const code = async (body: object) => (await post(body)).body.error.code;
    assert.equal(await code({}), 'bad-request');
    assert.equal(
      await code(testOrder({ id: randomUUID(), vmUuid: vtpm.vmUuid }, 'LIVE').body),
      'bad-request',
    );
    assert.equal(await code(testOrder(vtpm, 'OFFLINE').body), 'not-stopped');
    const forged = Buffer.from(testOrder(vtpm, 'LIVE').body.order, 'base64');
    forged[forged.length - 1]! ^= 1;
    assert.equal(await code({ order: forged.toString('base64') }), 'bad-request');
    await world.supervisor.call('POST', '/vtpms/web1/stop');
    assert.equal(await code(testOrder(vtpm, 'LIVE').body), 'not-running');
    assert.equal(
      (await world.supervisor.call('DELETE', '/vtpms/web1/migrate')).body.error.code,
      'unknown-migration',
    );
  });

  it('moves one that is stopped, and hands a cancellation on', async () => {
    const vtpm = await world.running();
    await world.supervisor.call('POST', '/vtpms/web1/stop');
    const begun = await world.order(vtpm, 'OFFLINE');
    begun.call.say('PREPARED');
    await begun.lines.phase('PREPARED');
    assert.deepEqual((await world.supervisor.call('DELETE', '/vtpms/web1/migrate')).body, {
      cancelled: true,
    });
    await begun.call.heard('cancel');
    begun.call.end('ABORTED', { reason: 'migration-aborted' });
    await begun.lines.ended;
    assert.equal(await world.state(), 'stopped');
    const again = await world.order(vtpm, 'OFFLINE');
    await world.frozen(again);
    again.call.end('COMMITTED');
    await again.lines.ended;
    assert.equal(await world.state(), 'moved');
  });

  it('does not begin what was cancelled before the manager heard of it', async () => {
    const vtpm = await world.running();
    await world.supervisor.call('POST', '/vtpms/web1/stop');
    let tell = (): void => {};
    const asked = new Promise<void>((resolve) => {
      world.manager.beforePeers = () => {
        resolve();
        return new Promise((told) => {
          tell = told;
        });
      };
    });
    const migrating = world.supervisor.call('POST', '/vtpms/web1/migrate', testOrder(vtpm, 'OFFLINE').body);
    await asked;
    assert.deepEqual((await world.supervisor.call('DELETE', '/vtpms/web1/migrate')).body, {
      cancelled: true,
    });
    tell();
    assert.equal((await migrating).body.error.code, 'migration-aborted');
    assert.deepEqual([(await world.view()).migration, await world.state()], [null, 'stopped']);
  });

  it('does not go with its VM where nothing is check-pointed', async () => {
    await world.restart(['--checkpoint', 'off']);
    const order = testOrder(await world.running(), 'VMM');
    const { error } = (await world.supervisor.call('POST', '/vtpms/web1/migrate', order.body)).body;
    assert.equal(error.code, 'bad-request');
    assert.match(error.message, /checkpoint to always/);
  });

  it('I-3: starts nothing while it is in doubt, and does what the manager says then', async () => {
    for (const verdict of ['COMMIT', 'ABORT'] as const) {
      const vtpm = await world.running();
      const guest = await connectDoor(vtpm.sockets.tpm);
      await exchange(guest, 'one');
      const begun = await world.order(vtpm);
      await world.frozen(begun);
      world.manager.migrations.set(begun.order.migration, { state: 'in-doubt' });
      begun.call.end('IN_DOUBT', { reason: 'peer-unreachable', message: 'it does not answer' });
      await begun.lines.phase('IN_DOUBT');
      const loads = world.manager.tickets.length;
      for (const verb of ['start', 'stop']) {
        const { error } = (await world.supervisor.call('POST', `/vtpms/web1/${verb}`)).body;
        assert.equal(error.code, 'migrating', verb);
        assert.match(error.message, /on its way to other .*does not answer.*vtpmctl migrate resolve web1/);
      }
      assert.equal((await world.supervisor.call('DELETE', '/vtpms/web1')).body.error.code, 'migrating');
      assert.equal(world.manager.tickets.length, loads);
      world.manager.migrations.delete(begun.order.migration);
      const record = world.manager.records.get(vtpm.id)!;
      if (verdict === 'COMMIT') world.manager.records.set(vtpm.id, { ...record, kind: 'moved' });
      const event = {
        type: 'migration',
        migration: begun.order.migration,
        id: vtpm.id,
        role: 'source',
        verdict,
      };
      const two = verdict === 'ABORT' ? exchange(guest, 'two') : undefined;
      world.manager.emit(event);
      await world.becomes(verdict === 'COMMIT' ? 'moved' : 'running');
      if (two) assert.equal(await two, 'two');
      else await world.supervisor.call('DELETE', '/vtpms/web1');
    }
  });

  it('asks the manager where that ended in the middle', async () => {
    const vtpm = await world.running();
    const guest = await connectDoor(vtpm.sockets.tpm);
    await exchange(guest, 'one');
    const begun = await world.order(vtpm);
    await world.frozen(begun);
    world.toolstack.stop();
    assert.equal((await begun.lines.phase('IN_DOUBT')).reason, 'manager-unreachable');
    const two = exchange(guest, 'two');
    await world.manager.stop();
    await world.manager.start();
    await world.becomes('running');
    assert.equal(await two, 'two');
  });

  it('a worker that ends while it is being frozen is followed by none until it is known where it goes on', async () => {
    const vtpm = await world.running();
    const guest = await connectDoor(vtpm.sockets.tpm);
    await exchange(guest, 'one');
    const begun = await world.order(vtpm);
    begun.call.say('FREEZING');
    await begun.lines.phase('FREEZING');
    const loads = world.manager.tickets.length;
    guest.write('crash');
    await world.becomes('migrating');
    assert.equal(world.manager.tickets.length, loads);
    begun.call.end('ABORTED', { reason: 'migration-aborted' });
    await begun.lines.phase('ABORTED');
    await world.becomes('running');
    assert.equal(world.manager.tickets.length, loads + 1);
  });

  describe("I-3: a supervisor that is killed does what the manager's record says", () => {
    // At every step: test/long/supervisor-migration.
    it('that it lives there', () => world.killDeparting('migrate.source.reaped', 'COMMIT'));
    it('that it lives here', () => world.killDeparting('migrate.source.reaped', 'ABORT'));
  });
});
