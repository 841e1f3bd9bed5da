import assert from 'node:assert/strict';
import { randomBytes, randomUUID } from 'node:crypto';
import { existsSync, mkdirSync, writeFileSync } from 'node:fs';
import { dirname } from 'node:path';
import grpc from '@grpc/grpc-js';
import { decode } from 'vtpm-proto';
import { MIGRATION_BARRIERS } from 'vtpm-toolstack/supervisor/migration/barriers';
import {
  Lines,
  type OrderedCall,
  StubToolstackSocket,
  type TestOrder,
  testOrder,
} from './migration-fixture.js';
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

describe('migrations of a supervisor', function () {
  this.timeout(60_000);
  let image: string;
  let manifest: string;
  let home: string;
  let supervisor: SupervisorProcess;
  let manager: StubManager;
  let toolstack: StubToolstackSocket;
  /** What the supervisor answered to what comes. */
  let answers: { migration: string; verb: string; code?: string; message?: string }[];

  before(async () => {
    image = temporaryDirectory();
    manifest = await buildStubImage(image);
  });
  after(() => removeDirectory(image));
  beforeEach(async () => {
    home = temporaryDirectory();
    answers = [];
    supervisor = await start();
    manager = new StubManager(supervisor.paths);
    manager.onAnswer = (migration, verb, body) => answers.push({ migration, verb, ...body });
    await manager.start();
    toolstack = new StubToolstackSocket();
    await toolstack.start(supervisor.paths);
    mkdirSync(dirname(supervisor.paths.toolstack.key), { recursive: true, mode: 0o700 });
    writeFileSync(supervisor.paths.toolstack.key, Buffer.alloc(32, 7), { mode: 0o600 });
    await until(async () => (await supervisor.call('GET', '/health')).body.managerConnected === true);
  });
  afterEach(async () => {
    await supervisor.end('SIGKILL');
    toolstack.stop();
    await manager.stop();
    removeDirectory(home);
  });

  function start(flags: string[] = [], node?: string): Promise<SupervisorProcess> {
    const how = node === undefined ? {} : { wrapper: ['env', `NODE_OPTIONS=${node}`] };
    return new SupervisorProcess(home, manifest, ['--log-format', 'json', ...flags], how).ready();
  }

  async function restart(flags: string[] = []): Promise<void> {
    await supervisor.end('SIGKILL');
    supervisor = await start(flags);
    await until(async () => (await supervisor.call('GET', '/health')).body.managerConnected === true);
  }

  const view = async (name = 'web1') => (await supervisor.call('GET', `/vtpms/${name}`)).body;
  const state = async (name = 'web1') => (await view(name)).state as string;
  const becomes = (wanted: string, name = 'web1') => until(async () => (await state(name)) === wanted);

  async function running(): Promise<{ id: string; vmUuid: string; sockets: { tpm: string } }> {
    const { body } = await supervisor.create('web1');
    const started = await supervisor.call('POST', '/vtpms/web1/start');
    assert.equal(started.status, 200, JSON.stringify(started.body));
    return { ...body, ...started.body };
  }

  interface Begun {
    readonly order: TestOrder;
    readonly lines: Lines;
    readonly call: OrderedCall;
  }

  async function order(
    vtpm: { id: string; vmUuid: string },
    mode: 'LIVE' | 'OFFLINE' = 'LIVE',
  ): Promise<Begun> {
    const made = testOrder(vtpm, mode);
    const lines = new Lines(supervisor.paths.supervisor.socket, '/vtpms/web1/migrate', made.body);
    const call = await toolstack.next();
    return { order: made, lines, call };
  }

  async function frozen(begun: Begun): Promise<void> {
    for (const phase of ['CONNECTING', 'FREEZING', 'FROZEN'] as const) begun.call.say(phase);
    await begun.call.heard('reaped');
  }

  describe('at the host that a vTPM leaves', () => {
    it('ends the worker when it is frozen and says so then, keeps its guests, and lets go when it has gone', async () => {
      const vtpm = await running();
      const guest = await connectDoor(vtpm.sockets.tpm);
      assert.equal(await exchange(guest, 'one'), 'one');
      const begun = await order(vtpm);
      begun.call.say('CONNECTING');
      await begun.lines.phase('CONNECTING');
      assert.equal(await state(), 'running');
      assert.equal((await supervisor.call('POST', '/vtpms/web1/stop')).body.error.code, 'busy');
      begun.call.say('FREEZING');
      begun.call.say('FROZEN');
      await begun.call.heard('reaped');
      assert.deepEqual(workersOf(supervisor.paths), [], 'nothing of it runs when that is said');
      assert.equal(await state(), 'migrating');
      assert.ok(!guest.destroyed);
      const closed = new Promise((resolve) => guest.once('close', resolve));
      begun.call.say('DECIDING', { bytesSent: 7n, bytesTotal: 7n, downtimeUs: 5n });
      await begun.lines.phase('DECIDING');
      assert.deepEqual((await supervisor.call('DELETE', '/vtpms/web1/migrate')).body, { cancelled: false });
      begun.call.end('COMMITTED', { downtimeUs: 9n, message: '' });
      const last = await begun.lines.phase('COMMITTED');
      assert.deepEqual([last.downtimeUs, last.phase], [9, 'COMMITTED']);
      const { state: now, movedTo, migration } = await view();
      assert.deepEqual([now, movedTo, migration], ['moved', 'other', null]);
      assert.equal(await begun.lines.ended, 200);
      await closed;
      assert.ok(!existsSync(vtpm.sockets.tpm));
      const started = await supervisor.call('POST', '/vtpms/web1/start');
      assert.deepEqual([started.status, started.body.error.code], [409, 'moved']);
      assert.match(started.body.error.message, /lives on other/);
      await restart();
      assert.equal(await state(), 'moved');
      assert.equal((await supervisor.call('DELETE', '/vtpms/web1')).status, 200);
    });

    it('has another worker go on with the same guests where it is aborted', async () => {
      const vtpm = await running();
      const guest = await connectDoor(vtpm.sockets.tpm);
      await exchange(guest, 'one');
      const begun = await order(vtpm);
      await frozen(begun);
      const answered = exchange(guest, 'two');
      begun.call.end('ABORTED', { reason: 'peer-platform', message: 'its PCRs are not approved' });
      const last = await begun.lines.phase('ABORTED');
      assert.equal(last.reason, 'peer-platform');
      assert.equal(await answered, 'two');
      assert.equal(await state(), 'running');
      assert.deepEqual(manager.tickets.at(-1)?.verbs, ['RESUME']);
      assert.equal((await view()).migration, null);
      // And is as good as new.
      const again = await order(vtpm);
      await frozen(again);
      again.call.end('ABORTED');
      await again.lines.ended;
      assert.equal(await exchange(guest, 'three'), 'three');
    });

    it('changes nothing where it is refused, aborted before the freeze, or a dry run', async () => {
      const vtpm = await running();
      const before = workersOf(supervisor.paths);
      const refused = testOrder(vtpm, 'LIVE');
      const refusing = supervisor.call('POST', '/vtpms/web1/migrate', refused.body);
      (await toolstack.next()).refuse(grpc.status.NOT_FOUND, 'unknown-peer', 'no such host');
      const answer = await refusing;
      assert.deepEqual(answer.body.error, { code: 'unknown-peer', message: 'no such host' });
      assert.equal((await view()).migration, null);
      const aborted = await order(vtpm);
      aborted.call.end('ABORTED', { reason: 'peer-unreachable' });
      await aborted.lines.phase('ABORTED');
      const dry = testOrder(vtpm, 'LIVE', true);
      const lines = new Lines(supervisor.paths.supervisor.socket, '/vtpms/web1/migrate', dry.body);
      const call = await toolstack.next();
      call.say('CONNECTING');
      call.end('PREPARED', { checks: [{ name: 'platform', detail: 'approved' }] });
      assert.deepEqual((await lines.phase('PREPARED')).checks, [{ name: 'platform', detail: 'approved' }]);
      await lines.ended;
      assert.deepEqual([(await view()).migration, await state()], [null, 'running']);
      assert.deepEqual(workersOf(supervisor.paths), before);
    });

    it('refuses an order for another vTPM, another state, or none, and one that is forged', async () => {
      const vtpm = await running();
      const post = (body: object) => supervisor.call('POST', '/vtpms/web1/migrate', body);
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
      await supervisor.call('POST', '/vtpms/web1/stop');
      assert.equal(await code(testOrder(vtpm, 'LIVE').body), 'not-running');
      assert.equal(
        (await supervisor.call('DELETE', '/vtpms/web1/migrate')).body.error.code,
        'unknown-migration',
      );
    });

    it('moves one that is stopped, and hands a cancellation on', async () => {
      const vtpm = await running();
      await supervisor.call('POST', '/vtpms/web1/stop');
      const begun = await order(vtpm, 'OFFLINE');
      begun.call.say('PREPARED');
      await begun.lines.phase('PREPARED');
      assert.deepEqual((await supervisor.call('DELETE', '/vtpms/web1/migrate')).body, { cancelled: true });
      await begun.call.heard('cancel');
      begun.call.end('ABORTED', { reason: 'migration-aborted' });
      await begun.lines.ended;
      assert.equal(await state(), 'stopped');
      const again = await order(vtpm, 'OFFLINE');
      await frozen(again);
      again.call.end('COMMITTED');
      await again.lines.ended;
      assert.equal(await state(), 'moved');
    });

    it('I-3: starts nothing while it is in doubt, and does what the manager says then', async () => {
      for (const verdict of ['COMMIT', 'ABORT'] as const) {
        const name = 'web1';
        const vtpm = await running();
        const guest = await connectDoor(vtpm.sockets.tpm);
        await exchange(guest, 'one');
        const begun = await order(vtpm);
        await frozen(begun);
        manager.migrations.set(begun.order.migration, { state: 'in-doubt' });
        begun.call.end('IN_DOUBT', { reason: 'peer-unreachable', message: 'it does not answer' });
        await begun.lines.phase('IN_DOUBT');
        const loads = manager.tickets.length;
        for (const verb of ['start', 'stop']) {
          assert.equal(
            (await supervisor.call('POST', `/vtpms/web1/${verb}`)).body.error.code,
            'migrating',
            verb,
          );
        }
        assert.equal((await supervisor.call('DELETE', '/vtpms/web1')).body.error.code, 'migrating');
        assert.equal(manager.tickets.length, loads);
        manager.migrations.delete(begun.order.migration);
        const record = manager.records.get(vtpm.id)!;
        if (verdict === 'COMMIT') manager.records.set(vtpm.id, { ...record, kind: 'moved' });
        const event = {
          type: 'migration',
          migration: begun.order.migration,
          id: vtpm.id,
          role: 'source',
          verdict,
        };
        const two = verdict === 'ABORT' ? exchange(guest, 'two') : undefined;
        manager.emit(event);
        await becomes(verdict === 'COMMIT' ? 'moved' : 'running', name);
        if (two) assert.equal(await two, 'two');
        else await supervisor.call('DELETE', '/vtpms/web1');
      }
    });

    it('asks the manager where that ended in the middle', async () => {
      const vtpm = await running();
      const guest = await connectDoor(vtpm.sockets.tpm);
      await exchange(guest, 'one');
      const begun = await order(vtpm);
      await frozen(begun);
      toolstack.stop();
      assert.equal((await begun.lines.phase('IN_DOUBT')).reason, 'manager-unreachable');
      const two = exchange(guest, 'two');
      await manager.stop();
      await manager.start();
      await becomes('running');
      assert.equal(await two, 'two');
    });

    it('a worker that ends while it is being frozen is followed by none until it is known where it goes on', async () => {
      const vtpm = await running();
      const guest = await connectDoor(vtpm.sockets.tpm);
      await exchange(guest, 'one');
      const begun = await order(vtpm);
      begun.call.say('FREEZING');
      await begun.lines.phase('FREEZING');
      const loads = manager.tickets.length;
      guest.write('crash');
      await becomes('migrating');
      assert.equal(manager.tickets.length, loads);
      begun.call.end('ABORTED', { reason: 'migration-aborted' });
      await begun.lines.phase('ABORTED');
      await becomes('running');
      assert.equal(manager.tickets.length, loads + 1);
    });

    for (const { name } of MIGRATION_BARRIERS.filter(({ side }) => side === 'source')) {
      for (const verdict of ['COMMIT', 'ABORT'] as const) {
        it(`I-3: a supervisor that is killed at "${name}" does what the manager's record says: ${verdict}`, async () => {
          await supervisor.end('SIGKILL');
          const hook = `globalThis[Symbol.for('vtpm.barrier')]=(name)=>{if(name===${JSON.stringify(name)})process.kill(process.pid,'SIGKILL')}`;
          supervisor = await start([], `--import=data:text/javascript,${encodeURIComponent(hook)}`);
          await until(async () => (await supervisor.call('GET', '/health')).body.managerConnected === true);
          const vtpm = await running();
          const made = testOrder(vtpm, 'LIVE');
          const lines = new Lines(supervisor.paths.supervisor.socket, '/vtpms/web1/migrate', made.body);
          lines.ended.catch(() => undefined);
          void toolstack.next().then(async (call) => {
            for (const phase of ['FREEZING', 'FROZEN'] as const) call.say(phase);
            await call.heard('reaped');
            call.end(verdict === 'COMMIT' ? 'COMMITTED' : 'ABORTED');
          });
          // An end that is aborted settles nothing.
          const comes = name !== 'migrate.source.settled' || verdict === 'COMMIT';
          if (comes) await supervisor.end();
          else await lines.ended;
          const record = manager.records.get(vtpm.id)!;
          const left = verdict === 'COMMIT' ? ({ kind: 'moved' } as const) : { isSuspended: true };
          manager.records.set(vtpm.id, { ...record, ...left });
          if (comes) {
            manager.migrations.set(made.migration, { state: 'departing' });
            await restart();
            assert.equal(await state(), name === 'migrate.source.settled' ? 'moved' : 'migrating');
            manager.migrations.delete(made.migration);
            await manager.stop();
            await manager.start();
          }
          await becomes(verdict === 'COMMIT' ? 'moved' : 'running');
          if (verdict === 'ABORT' && comes) {
            assert.deepEqual(manager.tickets.at(-1)?.verbs, ['RESUME']);
            const { vmRunId } = manager.tickets.at(-1)!;
            assert.deepEqual(vmRunId, manager.tickets.at(-2)!.vmRunId, 'the same run of its VM');
          }
        });
      }
    }
  });

  describe('at the host that a vTPM comes to', () => {
    function incoming(change: Record<string, unknown> = {}) {
      const description = {
        format: 1,
        name: 'web1',
        isolation: 'sandbox',
        autostart: false,
        startup: 'clear',
        doors: ['tpm'],
        stateBlobs: 'reference',
        socketMode: '0600',
      };
      return {
        type: 'incoming',
        migration: randomBytes(16).toString('hex'),
        id: randomUUID(),
        vmUuid: randomUUID(),
        vmRunId: randomUUID(),
        epoch: 7,
        generation: 9,
        mode: 'LIVE',
        from: { name: 'other', hostId: 'cd'.repeat(32) },
        description: JSON.stringify(description),
        dryRun: false,
        ...change,
      };
    }
    const said = (verb: string, { migration }: { migration: string }) =>
      until(() => answers.some((answer) => answer.migration === migration && answer.verb === verb));
    const decided = (event: ReturnType<typeof incoming>, verdict: 'COMMIT' | 'ABORT') =>
      manager.emit({
        type: 'migration',
        migration: event.migration,
        id: event.id,
        role: 'destination',
        verdict,
      });

    /** A Load that waits for what it is to get. @returns what ends the waiting */
    function holdLoads(event: ReturnType<typeof incoming>): {
      commit(): void;
      abort(): void;
      begun: Promise<void>;
    } {
      let begin = (): void => {};
      let go = (): void => {};
      const begun = new Promise<void>((resolve) => (begin = resolve));
      const over = new Promise<void>((resolve) => (go = resolve));
      manager.beforeLoad = () => {
        begin();
        return over;
      };
      const { id, vmUuid, epoch } = event;
      return {
        begun,
        commit: () => {
          manager.records.set(id, { vmUuid, kind: 'live', epoch, generation: 9 });
          go();
        },
        abort: () => {
          manager.refuse = { reason: 'migration-aborted', message: 'the source has given it up' };
          go();
        },
      };
    }

    it('makes an entry and a worker whose Load waits, and shows doors when it serves', async () => {
      const event = incoming();
      const load = holdLoads(event);
      manager.emit(event);
      await load.begun;
      await said('accept', event);
      const waiting = await view();
      assert.deepEqual([waiting.state, waiting.id, waiting.vmUuid], ['arriving', event.id, event.vmUuid]);
      assert.ok(!existsSync(waiting.sockets.tpm));
      const [ticket] = manager.tickets;
      assert.deepEqual([ticket!.verbs, ticket!.expectedEpoch], [['RESUME'], 7n]);
      assert.equal(Buffer.from(ticket!.vmRunId).toString('hex'), event.vmRunId.replaceAll('-', ''));
      for (const verb of ['start', 'stop']) {
        assert.equal((await supervisor.call('POST', `/vtpms/web1/${verb}`)).status, 409);
      }
      load.commit();
      await becomes('running');
      const now = await view();
      assert.deepEqual([now.epoch, now.migration, now.movedTo], [8, null, null]);
      const guest = await connectDoor(now.sockets.tpm);
      assert.equal(await exchange(guest, 'here'), 'here');
      // It is as any other: it goes on, it is stopped, it is started, and never made anew.
      guest.write('crash');
      await until(() => manager.tickets.length === 2);
      await becomes('running');
      manager.beforeLoad = undefined;
      await supervisor.call('POST', '/vtpms/web1/stop');
      assert.equal((await supervisor.call('POST', '/vtpms/web1/start')).body.state, 'running');
      assert.deepEqual(manager.tickets.at(-1)!.verbs, ['COLD']);
    });

    it('the delegation that it comes with lets nobody make another TPM of its id', async () => {
      const event = incoming({ mode: 'OFFLINE' });
      manager.emit(event);
      await said('accept', event);
      const { vtpms } = JSON.parse(
        (await import('node:fs')).readFileSync(supervisor.paths.supervisor.vtpms, 'utf8'),
      ) as { vtpms: { delegation: string }[] };
      const { verbs } = decode('Delegation', Buffer.from(vtpms[0]!.delegation, 'base64'));
      assert.deepEqual(verbs, ['COLD', 'RESUME']);
    });

    it('leaves nothing of one that is aborted', async () => {
      const event = incoming();
      const load = holdLoads(event);
      manager.emit(event);
      await said('accept', event);
      load.abort();
      decided(event, 'ABORT');
      await until(async () => (await supervisor.call('GET', '/vtpms')).body.vtpms.length === 0);
      assert.deepEqual(workersOf(supervisor.paths), []);
      manager.refuse = undefined;
      // The name is free.
      assert.equal((await supervisor.create('web1')).status, 201);
    });

    it('takes in one that is stopped, which stays so', async () => {
      const event = incoming({ mode: 'OFFLINE' });
      manager.emit(event);
      await said('accept', event);
      assert.equal(await state(), 'arriving');
      manager.records.set(event.id, { vmUuid: event.vmUuid, kind: 'live', epoch: 8, generation: 9 });
      decided(event, 'COMMIT');
      await becomes('stopped');
      assert.equal(manager.tickets.length, 0);
      assert.equal((await supervisor.call('POST', '/vtpms/web1/start')).body.state, 'running');
    });

    it('takes back one that was here, under the name that it has here', async () => {
      const vtpm = await running();
      const begun = await order(vtpm);
      await frozen(begun);
      begun.call.end('COMMITTED');
      await begun.lines.ended;
      const gone = manager.records.get(vtpm.id)!;
      manager.records.set(vtpm.id, { ...gone, kind: 'moved' });
      for (const verdict of ['ABORT', 'COMMIT'] as const) {
        const event = incoming({ id: vtpm.id, vmUuid: vtpm.vmUuid, mode: 'OFFLINE' });
        manager.emit(event);
        await said('accept', event);
        assert.equal(await state(), 'arriving');
        if (verdict === 'COMMIT') manager.records.set(vtpm.id, { ...gone, kind: 'live', epoch: 8 });
        decided(event, verdict);
        await becomes(verdict === 'COMMIT' ? 'stopped' : 'moved');
      }
      assert.equal((await supervisor.call('POST', '/vtpms/web1/start')).body.state, 'running');
    });

    it('refuses by name, before anything stops, what it does not take', async () => {
      await supervisor.create('taken');
      const { body: other } = await supervisor.create('other');
      const described = JSON.parse(incoming().description) as object;
      const cases: readonly [Record<string, unknown>, string][] = [
        [{ description: JSON.stringify({ ...described, name: 'taken' }) }, 'name-taken'],
        [{ id: other.id }, 'name-taken'],
        [{ description: 'no JSON' }, 'bad-request'],
        [{ description: JSON.stringify({ ...described, format: 2 }) }, 'newer-format'],
        [{ description: JSON.stringify({ ...described, doors: ['window'] }) }, 'bad-request'],
        [{ description: JSON.stringify({ ...described, name: '../../etc' }) }, 'usage'],
      ];
      for (const [change, code] of cases) {
        const event = incoming(change);
        manager.emit(event);
        await said('refuse', event);
        assert.equal(answers.at(-1)!.code, code, answers.at(-1)!.message);
      }
      assert.equal((await supervisor.call('GET', '/vtpms')).body.vtpms.length, 2);
      const dry = incoming({ dryRun: true });
      manager.emit(dry);
      await said('accept', dry);
      assert.equal((await supervisor.call('GET', '/vtpms')).body.vtpms.length, 2);
    });

    it('takes none, or those that it knows, where it is set so', async () => {
      for (const policy of ['none', 'known']) {
        await restart(['--accept-migrations', policy]);
        const event = incoming();
        manager.emit(event);
        await said('refuse', event);
        assert.equal(answers.at(-1)!.code, 'migration-refused');
      }
    });

    it('hears of what came while it was away', async () => {
      await supervisor.end('SIGKILL');
      const event = incoming({ mode: 'OFFLINE' });
      manager.migrations.set(event.migration, { state: 'preparing', incoming: event });
      supervisor = await start();
      await said('accept', event);
      assert.equal(await state(), 'arriving');
    });

    it('a worker that is lost before the decision ends the migration', async () => {
      const event = incoming();
      const load = holdLoads(event);
      manager.emit(event);
      await load.begun;
      await said('accept', event);
      const [worker] = workersOf(supervisor.paths);
      process.kill(worker!.pid, 'SIGKILL');
      await until(() => answers.some(({ verb }) => verb === 'refuse' || verb === 'cancel'));
      decided(event, 'ABORT');
      await until(async () => (await supervisor.call('GET', '/vtpms')).body.vtpms.length === 0);
    });

    it('a worker that is lost behind the decision is followed by one that goes on', async () => {
      const event = incoming();
      const load = holdLoads(event);
      manager.emit(event);
      await said('accept', event);
      await load.begun;
      manager.beforeLoad = undefined;
      const [worker] = workersOf(supervisor.paths);
      manager.records.set(event.id, {
        vmUuid: event.vmUuid,
        kind: 'live',
        epoch: 8,
        generation: 9,
        isSuspended: true,
      });
      process.kill(worker!.pid, 'SIGKILL');
      await becomes('running');
      const { verbs, vmRunId, expectedEpoch } = manager.tickets.at(-1)!;
      assert.deepEqual([verbs, expectedEpoch], [['RESUME'], 8n]);
      assert.equal(Buffer.from(vmRunId).toString('hex'), event.vmRunId.replaceAll('-', ''));
    });

    for (const { name } of MIGRATION_BARRIERS.filter(({ side }) => side === 'destination')) {
      for (const verdict of ['COMMIT', 'ABORT'] as const) {
        // Behind the manager's grant there is one verdict.
        if (verdict === 'ABORT' && (name.endsWith('serving') || name.endsWith('shown'))) continue;
        it(`I-3: a supervisor that is killed at "${name}" does what the manager's record says: ${verdict}`, async () => {
          await supervisor.end('SIGKILL');
          const hook = `globalThis[Symbol.for('vtpm.barrier')]=(name)=>{if(name===${JSON.stringify(name)})process.kill(process.pid,'SIGKILL')}`;
          supervisor = await start([], `--import=data:text/javascript,${encodeURIComponent(hook)}`);
          await until(async () => (await supervisor.call('GET', '/health')).body.managerConnected === true);
          const event = incoming();
          const load = holdLoads(event);
          manager.emit(event);
          if (name.endsWith('serving') || name.endsWith('shown')) {
            await load.begun;
            load.commit();
          }
          await supervisor.end();
          manager.beforeLoad = undefined;
          if (verdict === 'COMMIT') {
            const { vmUuid } = event;
            manager.records.set(event.id, {
              vmUuid,
              kind: 'live',
              epoch: 8,
              generation: 9,
              isSuspended: true,
            });
          }
          await restart();
          if (verdict === 'ABORT') {
            await until(async () => (await supervisor.call('GET', '/vtpms')).body.vtpms.length === 0);
            return;
          }
          // One that had no worker here yet is as it came: stopped.
          const expected = name.endsWith('entry')
            ? 'stopped'
            : name.endsWith('shown')
              ? 'crashed'
              : 'running';
          await becomes(expected);
        });
      }
    }
  });
});
