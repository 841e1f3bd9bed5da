import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { createLogger } from 'vtpm-common';
import { type AuditLog, createAuditLog } from 'vtpm-manager/audit/index';
import { movedAway, takenBack } from 'vtpm-manager/records/index';
import { spoilAnchor } from 'vtpm-manager/store/index';
import { acceptStore } from 'vtpm-manager/store-acceptance';
import { MemoryStore } from '../support/memory-store.js';
import { decisionIn, idOf, Journey } from './migration-fixture.js';
import { refused, type Worker, World } from './ownership-fixture.js';

type Disk = Awaited<ReturnType<MemoryStore['list']>>;

describe('an old store that is accepted', () => {
  let directory: string;
  let a: World;
  let b: World;
  let worker: Worker;
  let way: Journey;
  let old: Disk;
  const diskOf = (world: World): Promise<Disk> => world.disk.list(undefined, Number.MAX_SAFE_INTEGER);
  beforeEach(async () => {
    directory = mkdtempSync(join(tmpdir(), 'vtpm-log-'));
    a = await World.create();
    b = await World.create();
    worker = await a.manufactured();
    old = await diskOf(a);
    way = new Journey(a, b, worker, 'OFFLINE');
  });
  afterEach(() => rmSync(directory, { recursive: true, force: true }));

  /** The store from before, and the log as it is now. */
  async function rollBack(world = a, disk = old): Promise<void> {
    const { keyId: id, auditKey: key } = world.keys.current;
    const audit = join(mkdtempSync(join(directory, 'log-')), 'audit.log');
    const log: AuditLog = await createAuditLog(audit, { id, key });
    await Promise.all(world.audited.map((event) => log.append(event)));
    await log.close();
    const store = new MemoryStore(disk);
    await spoilAnchor(store, world.keys);
    const paths = { audit } as never;
    const silent = createLogger('test', { 'log-level': 'silent', 'log-format': 'json' });
    const { counter } = world.anchor;
    await acceptStore({ store, keys: world.keys, paths, log: silent, mark: 'rolled-back' }, counter);
    Object.assign(world, { disk: store });
    await world.restart();
  }
  const header = async () => (await a.registry.view(way.id)).header;
  const load = async () =>
    await a.worker(worker.vtpm).load({ expectedEpoch: (await header()).epoch, verbs: ['COLD'] });

  it('I-3 brings nothing to life that was taken back since: the notice for its destination is lost with the store', async () => {
    await way.expect();
    await way.depart();
    await way.commit();
    const { departure } = await header();
    const facts = { migration: way.migrationId.toString('hex'), to: 'b', fenced: new Date(0).toISOString() };
    await a.registry.rescues.takeBack(way.id, { uid: 0 }, facts, (held, count) => {
      const gone = { host: departure!.destination, lastGeneration: 9n, epoch: 1n << 32n };
      return takenBack(a.keys, held, gone, count);
    });
    await rollBack();
    await assert.rejects(load(), refused('migrating'));
  });

  it('I-3 brings nothing to life that has moved since, as the audit log says', async () => {
    await way.expect();
    await way.depart();
    await a.registry.departures.commit(way.id, await way.commit());
    await rollBack();
    assert.deepEqual((await header()).marks, ['rolled-back']);
    await assert.rejects(load(), refused('migrating'));
    const [pending] = await a.registry.departures.pending();
    const { epoch, generation } = pending!;
    const signed = await b.registry.arrivals.abort({ ...way.inquiry(), epoch, generation });
    assert.equal(decisionIn(signed).verdict, 'COMMIT');
    await a.registry.departures.commit(way.id, signed);
    const { kind, epoch: left } = await header();
    assert.deepEqual([kind, left], ['MOVED', 1n]);
  });

  it('I-3 asks of what was on its way; where that came to nothing it goes on here', async () => {
    await way.depart();
    await rollBack();
    await assert.rejects(load(), refused('migrating'));
    await a.registry.departures.abort(way.id, await way.ask());
    assert.ok((await load()).generation > 1n << 32n);
  });

  it('I-3 brings nothing to life that has moved since, whatever was written after it', async () => {
    await way.expect();
    await way.depart();
    await a.registry.departures.commit(way.id, await way.commit());
    const line = { actor: 'manager', action: 'peer-connect', verdict: 'refused' } as const;
    a.audited.push(...Array.from({ length: 10_001 }, () => line));
    await rollBack();
    await assert.rejects(load(), refused('migrating'));
  });

  /** What the host does that is told of a rescue. */
  async function giveUp(rescuer: Buffer, epoch = (1n << 32n) - 1n): Promise<void> {
    const facts = { rescuer: rescuer.toString('hex') };
    const where = { migrationId: Buffer.alloc(16), destination: rescuer, at: 1n, mode: 'OFFLINE' } as const;
    await a.registry.rescues.giveUp(way.id, { destination: rescuer, epoch }, facts, (record, now) =>
      movedAway(record, { ...where, epoch, generation: 1n << 32n }, now),
    );
  }

  for (const verdict of ['done', 'intended'] as const) {
    it(`I-3 leaves dead what another host rescued since, where giving it up was ${verdict}`, async () => {
      const rescuer = randomBytes(32);
      await giveUp(rescuer);
      const kept = a.audited.filter((event) => event.action !== 'rescue' || event.verdict === verdict);
      a.audited.splice(0, a.audited.length, ...kept);
      await rollBack();
      const { kind, epoch, departure } = await header();
      assert.deepEqual([kind, epoch], ['MOVED', (1n << 32n) - 1n]);
      assert.deepEqual(Buffer.from(departure!.destination), rescuer);
      for (const expectedEpoch of [1n, 2n, epoch, epoch + 1n]) {
        await assert.rejects(
          a.worker(worker.vtpm).load({ expectedEpoch, verbs: ['COLD'] }),
          refused('moved'),
        );
      }
    });
  }

  it('lets go on what it rescued itself, what nobody was given, and what came back after a rescue', async () => {
    const entry = { actor: 'manager', action: 'rescue', vtpm: way.id, epoch: 1n, generation: 1n } as const;
    const rescuer = randomBytes(32).toString('hex');
    a.audited.push(
      { ...entry, verdict: 'done', facts: { host: rescuer } },
      { ...entry, verdict: 'refused', facts: { rescuer } },
      { ...entry, verdict: 'done', facts: { rescuer: 'somebody' } },
      { ...entry, epoch: 0n, verdict: 'done', facts: { rescuer } },
    );
    await rollBack();
    await load();
  });

  it('lets go on what stayed, and what came back', async () => {
    await way.depart();
    await a.registry.departures.abort(way.id, await way.ask());
    await rollBack();
    await load();
    old = await diskOf(a);
    const at = a.worker(worker.vtpm);
    await at.load({ expectedEpoch: (await header()).epoch, verbs: ['COLD'] });
    way = new Journey(a, b, at, 'OFFLINE');
    await way.expect();
    await way.depart();
    await a.registry.departures.commit(way.id, await way.commit());
    const there = b.worker(worker.vtpm);
    await there.load({ expectedEpoch: (await b.registry.view(way.id)).header.epoch, verbs: ['COLD'] });
    const back = new Journey(b, a, there, 'OFFLINE');
    await back.expect();
    await back.depart();
    await back.commit();
    await rollBack();
    await load();
  });

  it('lets go on what was only about to leave', async () => {
    await a.registry.departures.announce(way.id, way.destination);
    const facts = { migration: way.migrationId.toString('hex'), to: 'b', mode: 'OFFLINE' };
    a.audited.push({ actor: 'manager', action: 'migrate-out', verdict: 'failed', vtpm: way.id, facts });
    await rollBack();
    await load();
  });

  it('lets go on what came back, where the log does not say so', async () => {
    await way.depart();
    await a.registry.departures.abort(way.id, await way.ask());
    old = await diskOf(a);
    a.audited.splice(0, a.audited.length, ...a.audited.filter(({ action }) => action !== 'migrate-abort'));
    await rollBack();
    await load();
  });

  it('believes no entry that is not as a departure writes it', async () => {
    const facts = { migration: randomBytes(16).toString('hex'), to: 'somewhere', mode: 'LIVE' };
    a.audited.push({
      actor: 'manager',
      action: 'freeze',
      verdict: 'done',
      vtpm: way.id,
      epoch: 1n,
      generation: 1n,
      facts,
    });
    await rollBack();
    await load();
  });

  describe('where a vTPM had come', () => {
    let before: Disk;
    const isRefused = async (journey = way) => {
      await assert.rejects(journey.ask(), refused('in-doubt'));
      // However often, and after a restart too.
      await b.restart();
      await assert.rejects(journey.ask(), refused('in-doubt'));
    };

    for (const [what, isLogCut] of [
      ['as the audit log says', false],
      ['also where the log was cut with it', true],
    ] as const) {
      it(`I-3 says no ABORT of what was committed since, ${what}`, async () => {
        await way.expect();
        before = await diskOf(b);
        const { length } = b.audited;
        await way.depart();
        await way.commit();
        if (isLogCut) b.audited.splice(length);
        await rollBack(b, before);
        await isRefused();
      });
    }

    it('I-3 says no ABORT of what it knows nothing of any more', async () => {
      before = await diskOf(b);
      await way.expect();
      await way.depart();
      await way.commit();
      await rollBack(b, before);
      await isRefused();
    });

    it('I-3 says no ABORT of what was committed, whatever the log says after that', async () => {
      await way.expect();
      before = await diskOf(b);
      await way.depart();
      await way.commit();
      const facts = { migration: way.migrationId.toString('hex'), from: idOf(a).toString('hex') };
      b.audited.push({ actor: 'manager', action: 'migrate-abort', verdict: 'done', vtpm: way.id, facts });
      await rollBack(b, before);
      await isRefused();
    });

    it('says again what it has said, and decides what began after that', async () => {
      await way.expect();
      await way.depart();
      before = await diskOf(b);
      const signed = await way.ask();
      await rollBack(b, before);
      assert.deepEqual(await way.ask(), signed);
      await a.registry.departures.abort(way.id, signed);
      way = new Journey(a, b, a.worker(worker.vtpm), 'OFFLINE');
      await way.expect();
      await way.depart();
      assert.equal(decisionIn(await way.ask()).verdict, 'ABORT');
    });
  });
});
