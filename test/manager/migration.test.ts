import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import {
  decode,
  type FencingStatement,
  fencingText,
  type MigrateOrder,
  type SigningKey,
  signFencing,
  signingKeyFromSeed,
  signMigrateOrder,
} from 'vtpm-proto';
import {
  EventTail,
  type GivenOrder,
  type HostWorker,
  ManagerPair,
  type PairedHost,
} from '../support/manager-pair.js';
import { until as eventually } from '../support/until.js';
import type { TestVtpm } from '../support/worker-client.js';
import { crashingAt } from './platform-fixture.js';

const saved = (bytes: Uint8Array): string => Buffer.from(bytes).toString();

describe('a migration between two managers', () => {
  let pair: ManagerPair;
  let a: PairedHost;
  let b: PairedHost;
  before(async () => {
    pair = await ManagerPair.create();
    ({ a, b } = pair);
  });
  after(() => pair?.destroy());

  async function ended(given: GivenOrder, phase: string, reason = ''): Promise<void> {
    const last = await given.end();
    assert.deepEqual([last?.phase, last?.reason], [phase, reason], last?.message);
  }

  /** The order is given, its vTPM expected at `b` by a worker. */
  async function liveTo(worker: HostWorker, changes: Partial<MigrateOrder> = {}) {
    const given = a.give(await a.order(worker.vtpm, b, { mode: 'LIVE', ...changes }));
    const incoming = await b.events.next('incoming');
    // The source's epoch is what the ticket of the one that waits expects.
    const waiting = b.worker(worker.vtpm, ['RESUME'], BigInt(incoming.epoch as number));
    waiting.catch(() => undefined);
    const migration = String(incoming.migration);
    await b.call('POST', `/migrations/${migration}/accept`, {});
    return { given, waiting, migration };
  }

  async function stoppedAt(host: PairedHost, permanent: string): Promise<TestVtpm> {
    const worker = await host.manufactured(permanent);
    await worker.end();
    return worker.vtpm;
  }

  /** It is loaded there, and nowhere else. */
  async function livesAt(host: PairedHost, other: PairedHost, vtpm: TestVtpm): Promise<string> {
    await assert.rejects(other.worker(vtpm));
    const worker = await host.worker(vtpm);
    await worker.end();
    return saved(worker.grant.permanent);
  }

  it('moves a stopped vTPM: state, generation and epoch go on at the destination alone', async () => {
    const vtpm = await stoppedAt(a, 'P-one');
    const began = Date.now();
    const given = a.give(await a.order(vtpm, b));
    const incoming = await b.acceptNext();
    assert.equal(incoming.id, vtpm.id);
    assert.deepEqual(incoming.from, { name: 'a', hostId: a.hostId.toString('hex') });
    assert.equal(incoming.description, '{"name":"web1"}');
    assert.equal((await given.carryOut())?.phase, 'COMMITTED');
    const { bytesSent, bytesTotal } = given.last!;
    assert.ok(bytesSent > 0n && bytesSent === bytesTotal);
    const order = [
      'CONNECTING',
      'ATTESTING',
      'PREPARING',
      'PREPARED',
      'FREEZING',
      'FROZEN',
      'SENDING',
      'DECIDING',
    ];
    assert.deepEqual(given.phases, [...order, 'COMMITTED']);
    assert.equal(await livesAt(b, a, vtpm), 'P-one');
    for (const [host, role] of [
      [a, 'source'],
      [b, 'destination'],
    ] as const) {
      const told = await host.events.next('migration');
      assert.deepEqual([told.id, told.role, told.verdict], [vtpm.id, role, 'COMMIT']);
      const shown = await host.call('GET', `/migrations/${String(told.migration)}`);
      assert.deepEqual([shown.role, shown.state, shown.mode], [role, 'committed', 'OFFLINE']);
      assert.equal(shown.description, '{"name":"web1"}');
      const [begun, since] = [shown.begunAt, shown.since].map((time) => Date.parse(String(time)));
      assert.ok(began <= begun! && begun! <= since! && since! <= Date.now(), JSON.stringify(shown));
    }
  });

  it('moves a running vTPM: its worker is suspended, the one that waits at the destination goes on', async () => {
    const worker = await a.manufactured('P-live');
    const { given, waiting } = await liveTo(worker);
    await worker.suspends('V-live');
    assert.equal((await given.carryOut())?.phase, 'COMMITTED');
    const { grant, ...here } = await waiting;
    assert.equal(grant.arrived, true);
    assert.equal(saved(grant.permanent), 'P-suspended');
    assert.equal(saved(grant.suspended!.volatile), 'V-live');
    assert.equal(grant.epoch, 2n);
    assert.equal(grant.generation, 2n);
    await here.client.close();
    // The worker of before is fenced, whatever it does.
    await assert.rejects(worker.session.save({ permanent: Buffer.from('late') }));
  });

  it('brings a vTPM back, with epochs that rise', async () => {
    const vtpm = await stoppedAt(a, 'P-back');
    let epoch = 0;
    for (const [from, to] of [
      [a, b],
      [b, a],
      [a, b],
    ] as const) {
      const given = from.give(await from.order(vtpm, to));
      await to.acceptNext();
      assert.equal((await given.carryOut())?.phase, 'COMMITTED');
      const view = await to.vtpm(vtpm.id);
      assert.ok((view.epoch as number) > epoch);
      epoch = view.epoch as number;
    }
    assert.equal(await livesAt(b, a, vtpm), 'P-back');
  });

  it('checks everything in a dry run, and stops nothing', async () => {
    const worker = await a.manufactured('P-dry');
    const given = a.give(await a.order(worker.vtpm, b, { mode: 'LIVE', dryRun: true }));
    assert.equal((await b.acceptNext()).dryRun, true);
    await ended(given, 'PREPARED');
    assert.deepEqual(
      given.last?.checks.map(({ name }) => name),
      ['peer', 'libtpms', 'platform', 'ready'],
    );
    assert.equal((await worker.session.save({ permanent: Buffer.from('P-on') })).generation, 2n);
    await worker.end();
    assert.equal((await b.manager.admin('GET', `/vtpms/${worker.vtpm.id}`)).status, 404);
    assert.equal(await livesAt(a, b, worker.vtpm), 'P-on');
  });

  it('is refused at once where no toolstack listens at the destination, a dry run too: no-toolstack', async () => {
    const worker = await a.manufactured('P-nobody');
    b.events.close();
    for (const dryRun of [true, false]) {
      const given = a.give(await a.order(worker.vtpm, b, { mode: 'LIVE', dryRun }));
      await ended(given, 'ABORTED', 'no-toolstack');
      assert.match(given.last?.message ?? '', /no supervisor is connected/);
    }
    b.events = await EventTail.of(b.manager.paths.adminSocket);
    assert.equal((await worker.session.save({ permanent: Buffer.from('P-on') })).generation, 2n);
    await worker.end();
  });

  it('goes by the toolstack of the destination: what it refuses runs on at the source', async () => {
    const worker = await a.manufactured('P-refused');
    const given = a.give(await a.order(worker.vtpm, b, { mode: 'LIVE' }));
    const { migration } = await b.events.next('incoming');
    const [waits] = await b.migrations().then((all) => all.filter((one) => one.migration === migration));
    assert.equal((waits?.incoming as { id: string } | undefined)?.id, worker.vtpm.id);
    await b.call('POST', `/migrations/${String(migration)}/refuse`, {
      code: 'no-room',
      message: 'the rack is full',
    });
    await ended(given, 'ABORTED', 'migration-refused');
    assert.match(given.last?.message ?? '', /the rack is full/);
    assert.equal((await worker.session.save({ permanent: Buffer.from('P-on') })).generation, 2n);
    assert.equal((await b.events.next('migration').then(until(String(migration), b))).verdict, 'ABORT');
    await worker.end();
  });

  /** Events of earlier tests are left behind. */
  function until(migration: string, host: PairedHost) {
    return async (event: Readonly<Record<string, unknown>>): Promise<Readonly<Record<string, unknown>>> => {
      let told = event;
      while (told.migration !== migration) told = await host.events.next('migration');
      return told;
    };
  }

  it('is taken back before the freeze, and the worker has noticed nothing', async () => {
    const worker = await a.manufactured('P-cancel');
    const given = a.give(await a.order(worker.vtpm, b, { mode: 'LIVE' }));
    const { migration } = await b.events.next('incoming');
    given.say({ cancel: {} });
    await ended(given, 'ABORTED', 'migration-aborted');
    assert.equal((await b.events.next('migration').then(until(String(migration), b))).verdict, 'ABORT');
    await b.call('POST', `/migrations/${String(migration)}/accept`, {}, 404);
    assert.equal((await worker.session.save({ permanent: Buffer.from('P-on') })).generation, 2n);
    await worker.end();
  });

  it('is taken back after the freeze: the destination has the last word, and the vTPM stays', async () => {
    const worker = await a.manufactured('P-late');
    const { given, waiting } = await liveTo(worker);
    await worker.suspends('V-late');
    await given.reaches('FROZEN');
    given.say({ cancel: {} });
    await ended(given, 'ABORTED', 'migration-aborted');
    await assert.rejects(waiting, (error: { reason?: string }) => error.reason === 'migration-aborted');
    const again = await a.worker(worker.vtpm, ['RESUME']);
    assert.equal(saved(again.grant.suspended!.volatile), 'V-late');
    await again.end();
    await assert.rejects(b.worker(worker.vtpm, ['RESUME'], again.grant.epoch));
  });

  it('stays where the toolstack has not said that the worker ended, and says no more', async () => {
    const worker = await a.manufactured('P-unsaid');
    const { given } = await liveTo(worker);
    await worker.suspends('V-unsaid');
    await given.reaches('FROZEN');
    given.hangUp();
    await ended(given, 'ABORTED', 'migration-aborted');
    const again = await a.worker(worker.vtpm, ['RESUME']);
    assert.equal(saved(again.grant.suspended!.volatile), 'V-unsaid');
    await again.end();
  });

  it('is taken back before the freeze by its source while a worker waits: it hears migration-aborted', async () => {
    const worker = await a.manufactured('P-wait');
    const { given, waiting } = await liveTo(worker);
    await given.reaches('PREPARED');
    given.say({ cancel: {} });
    await assert.rejects(waiting, (error: { reason?: string }) => error.reason === 'migration-aborted');
    await worker.end();
  });

  it('thaws the worker where the destination goes between its freeze and its departure', async () => {
    const worker = await a.manufactured('P-thaw');
    const { given } = await liveTo(worker);
    const freeze = await worker.session.stream!.next();
    assert.equal(freeze.type, 'FREEZE');
    given.say({ cancel: {} });
    const thaw = await worker.session.stream!.next();
    assert.equal(thaw.type, 'THAW');
    await ended(given, 'ABORTED', 'migration-aborted');
    assert.equal((await worker.session.save({ permanent: Buffer.from('P-on') })).generation, 2n);
    await worker.end();
  });

  it('is given up where the toolstack goes without a word before the freeze', async () => {
    const worker = await a.manufactured('P-gone');
    const given = a.give(await a.order(worker.vtpm, b, { mode: 'LIVE' }));
    const { migration } = await b.events.next('incoming');
    given.leave();
    assert.equal((await b.events.next('migration').then(until(String(migration), b))).verdict, 'ABORT');
    assert.equal((await worker.session.save({ permanent: Buffer.from('P-on') })).generation, 2n);
    await worker.end();
  });

  it('stays in doubt while the destination is away, through a restart of the source, until `resolve`', async () => {
    const began = Date.now();
    const worker = await a.manufactured('P-doubt');
    const { vtpm } = worker;
    await worker.end();
    await b.stop();
    await b.start({ nodeArgs: crashingAt('migrate.destination.received.STATE', 1) });
    const given = a.give(await a.order(vtpm, b));
    const { migration } = await b.acceptNext();
    await given.reaches('FROZEN');
    given.say({ reaped: {} });
    await given.reaches('DECIDING');
    await b.stop();
    await a.call('POST', `/migrations/${String(migration)}/resolve`, {}, 409);
    await assert.rejects(a.worker(vtpm), (error: { reason?: string }) => error.reason === 'migrating');
    given.leave();
    await a.stop('SIGKILL');
    await a.start();
    const [doubt] = (await a.migrations()).filter((one) => one.migration === migration);
    assert.deepEqual([doubt?.state, doubt?.role, doubt?.peer], ['in-doubt', 'source', 'b']);
    // What the record has.
    assert.ok(Date.parse(String(doubt?.since)) >= began);
    assert.equal(doubt?.begunAt, null);
    await a.call('POST', `/migrations/${String(migration)}/resolve`, {}, 409);
    await b.start();
    const { verdict } = await a.call('POST', `/migrations/${String(migration)}/resolve`, {});
    assert.equal(verdict, 'ABORT');
    assert.equal(await livesAt(a, b, vtpm), 'P-doubt');
    const { entries } = (await a.call('GET', '/audit?tail=20')) as {
      entries: { action: string; verdict: string }[];
    };
    const asked = entries.filter(({ action }) => action === 'migrate-resolve').map((entry) => entry.verdict);
    assert.deepEqual(asked, ['failed', 'failed', 'done']);
  });

  describe('whose destination has committed it, and is gone before it could say so', () => {
    let vtpm: TestVtpm;
    let migration: string;

    const fencing = (changes: Partial<FencingStatement> = {}, key = a.manager.toolstack.key): string =>
      fencingText(
        signFencing(key, {
          format: 1,
          toolstackKey: key.publicKey,
          vtpmUuid: vtpm.uuid,
          host: b.hostId,
          lastGeneration: 9n,
          method: 'its power was cut',
          at: BigInt(Date.now()),
          ...changes,
        }),
      );
    const resolve = (text: string, status = 200) =>
      a.call('POST', `/migrations/${migration}/resolve`, { fencing: text }, status);
    const codeOf = ({ error }: Record<string, unknown>) => (error as { code: string }).code;
    const audited = async () => {
      const { entries } = (await a.call('GET', '/audit?tail=20')) as { entries: Record<string, unknown>[] };
      return entries.filter(({ action, vtpm: id }) => action === 'migrate-resolve' && id === vtpm.id);
    };

    before(async () => {
      await b.stop();
      await b.start({ nodeArgs: crashingAt('migrate.destination.committed', 1) });
      const worker = await a.manufactured('P-gone');
      ({ vtpm } = worker);
      const { given, migration: name, waiting } = await liveTo(worker);
      migration = name;
      await worker.suspends('V-gone');
      await given.reaches('FROZEN');
      given.say({ reaped: {} });
      await assert.rejects(waiting);
      await b.stop();
      given.leave();
      await a.stop('SIGKILL');
      await a.start();
    });

    it('I-3 stays in doubt for every statement that is not about that host and this departure: not-fenced', async () => {
      const stranger = signingKeyFromSeed(randomBytes(32));
      const wrong: [Partial<FencingStatement>, SigningKey?][] = [
        [{ host: randomBytes(32) }],
        [{ host: a.hostId }],
        [{ vtpmUuid: randomBytes(16) }],
        [{}, stranger],
        [{ at: BigInt(Date.now() - 60_000) }],
        [{ lastGeneration: 1n }],
        [{ method: '' }],
      ];
      for (const [changes, key] of wrong) {
        assert.equal(codeOf(await resolve(fencing(changes, key), 409)), 'not-fenced');
      }
      assert.equal(codeOf(await resolve('vtpm-fencing-1-AAAA', 409)), 'not-fenced');
      // Nor is it forgotten whom to ask.
      assert.equal(codeOf(await a.call('DELETE', '/peers/b', undefined, 409)), 'in-doubt');
      await assert.rejects(a.worker(vtpm), (error: { reason?: string }) => error.reason === 'migrating');
      assert.deepEqual([...new Set((await audited()).map(({ verdict }) => verdict))], ['refused']);
    });

    it('I-3 goes on at the source where it was frozen, on the word that it is gone; when it is back it has it no more', async () => {
      const stale = (await a.vtpm(vtpm.id)).epoch as number;
      assert.deepEqual(await resolve(fencing()), { migration, verdict: 'ABORT', takenBack: true });
      const view = await a.vtpm(vtpm.id);
      assert.deepEqual([view.kind, view.marks, view.epoch], ['live', ['rescued'], 2 ** 32]);
      assert.ok((view.generation as number) > 2 ** 32);
      const said = await eventually('the log says that it is done', async () => {
        const last = (await audited()).slice(-2);
        return last.at(-1)?.verdict === 'done' && last;
      });
      assert.deepEqual(
        said.map(({ verdict, facts }) => [verdict, (facts as { method: string }).method]),
        [
          ['intended', 'its power was cut'],
          ['done', 'its power was cut'],
        ],
      );
      const again = await a.worker(vtpm, ['RESUME']);
      assert.equal(saved(again.grant.permanent), 'P-suspended');
      assert.equal(saved(again.grant.suspended!.volatile), 'V-gone');
      await again.session.save({ permanent: Buffer.from('P-on') });

      // It has committed, and asks before it lets anybody run it.
      await b.start();
      assert.equal((await b.vtpm(vtpm.id)).kind, 'moved');
      for (const epoch of [BigInt(stale) + 1n, 2n ** 32n]) {
        const late = b.worker(vtpm, ['COLD'], epoch);
        await assert.rejects(late, (error: { reason?: string }) => error.reason === 'moved');
      }
      await again.session.save({ permanent: Buffer.from('P-and-on') });
      await again.end();
      await a.call('POST', `/migrations/${migration}/resolve`, { fencing: fencing() });
      assert.equal(await livesAt(a, b, vtpm), 'P-and-on');
    });
  });

  describe('is refused to who orders it', () => {
    let vtpm: TestVtpm;
    before(async () => {
      vtpm = await stoppedAt(a, 'P-order');
    });

    const refusals: [string, string, (order: MigrateOrder) => Partial<MigrateOrder>][] = [
      [
        'of an epoch that is over',
        'stale-epoch',
        ({ expectedEpoch }) => ({ expectedEpoch: expectedEpoch + 1n }),
      ],
      ['that knows of a newer generation', 'rollback-detected', () => ({ leastGeneration: 99n })],
      ['for another VM', 'wrong-vm', () => ({ vmUuid: randomBytes(16) })],
      ['for a vTPM that there is not', 'unknown-vtpm', () => ({ vtpmUuid: randomBytes(16) })],
      ['to another manager', 'wrong-manager', () => ({ managerId: randomBytes(32) })],
      ['to this very host', 'bad-request', () => ({ destination: a.hostId })],
    ];
    for (const [what, code, change] of refusals) {
      it(`an order ${what}: ${code}`, async () => {
        const signed = await a.order(vtpm, b);
        const order = decode('MigrateOrder', signed.order);
        const given = a.give(signMigrateOrder(a.manager.toolstack.key, { ...order, ...change(order) }));
        assert.equal((await given.refused)?.reason, code);
      });
    }

    it('an order that was used: ticket-expired', async () => {
      const signed = await a.order(vtpm, b, { dryRun: true });
      const first = a.give(signed);
      await b.acceptNext();
      await ended(first, 'PREPARED');
      assert.equal((await a.give(signed).refused)?.reason, 'ticket-expired');
    });

    it('two orders in one call, or none: bad-request', async () => {
      const signed = await a.order(vtpm, b, { dryRun: true });
      const given = a.give(signed);
      await b.events.next('incoming');
      given.say({ order: await a.order(vtpm, b) });
      assert.equal((await given.refused)?.reason, 'bad-request');
      assert.equal(
        (await a.give({ order: Buffer.alloc(0), signature: Buffer.alloc(0) }).refused)?.reason,
        'bad-request',
      );
    });

    const unreachable: [string, string, (order: MigrateOrder) => Promise<Partial<MigrateOrder>>][] = [
      ['a host that nobody enrolled', 'unknown-peer', async () => ({ destination: randomBytes(32) })],
    ];
    for (const [what, code, change] of unreachable) {
      it(`as a progress where it goes to ${what}: ${code}`, async () => {
        const order = decode('MigrateOrder', (await a.order(vtpm, b)).order);
        const given = a.give(
          signMigrateOrder(a.manager.toolstack.key, { ...order, ...(await change(order)) }),
        );
        await ended(given, 'ABORTED', code);
      });
    }

    it('as a progress where either host may not: peer-forbidden', async () => {
      for (const [host, name, right] of [
        [a, 'b', 'mayReceive'],
        [b, 'a', 'maySend'],
      ] as const) {
        await host.call('PATCH', `/peers/${name}`, { [right]: false });
        await ended(a.give(await a.order(vtpm, b)), 'ABORTED', 'peer-forbidden');
        await host.call('PATCH', `/peers/${name}`, { [right]: true });
      }
    });

    it('as a progress where a worker is connected, or none: by mode', async () => {
      const worker = await a.worker(vtpm);
      const connected = a.give(await a.order(vtpm, b, { mode: 'OFFLINE' }));
      assert.equal((await connected.refused)?.reason, 'busy');
      await worker.end();
    });
  });
});
