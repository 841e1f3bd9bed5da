import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { deriveRootKeys } from 'vtpm-manager/keys/index';
import type { MigrateMode } from 'vtpm-proto';
import { decisionIn, idOf, Journey, peerOf, REFERENCE, suspendingSave } from './migration-fixture.js';
import { refused, type Worker, World } from './ownership-fixture.js';

const text = (bytes: Uint8Array | undefined): string | undefined =>
  bytes && Buffer.from(bytes).toString('utf8');

describe('a vTPM that moves', () => {
  let a: World;
  let b: World;
  let worker: Worker;
  beforeEach(async () => {
    a = await World.create();
    b = await World.create();
    worker = await a.manufactured();
  });

  const journey = (mode: MigrateMode): Journey => new Journey(a, b, worker, mode);

  async function moved(mode: MigrateMode): Promise<Journey> {
    const way = journey(mode);
    await way.expect();
    const load = mode === 'OFFLINE' ? undefined : way.load({}, REFERENCE);
    if (mode !== 'OFFLINE') await way.suspend();
    await way.depart();
    const signed = await way.commit();
    await a.registry.departures.commit(way.id, signed);
    await load?.grant;
    return way;
  }

  for (const mode of ['OFFLINE', 'LIVE', 'VMM'] as const) {
    it(`${mode}: lives at the destination, with its state, its generation and the next epoch`, async () => {
      const way = await moved(mode);
      const { header } = await b.registry.view(way.id);
      const { header: stone } = await a.registry.view(way.id);
      const generation = mode === 'OFFLINE' ? 1n : 2n;
      assert.deepEqual([header.kind, header.epoch, header.generation], ['LIVE', 2n, generation]);
      assert.deepEqual([stone.kind, stone.epoch, stone.generation], ['MOVED', 1n, generation]);
      assert.deepEqual(Buffer.from(stone.departure!.destination), idOf(b));
      assert.equal(stone.wrappedDataKey.length, 0);
      assert.deepEqual((await a.registry.record(way.id))!.parts, []);
      assert.equal(header.lineage.length, 1);
      assert.deepEqual(Buffer.from(header.lineage[0]!.host), idOf(a));
      await assert.rejects(
        a.worker(worker.vtpm).load({ expectedEpoch: 1n, verbs: ['COLD'] }),
        refused('moved'),
      );
    });
  }

  it('is given to the worker that waits, with what it left suspended', async () => {
    const way = journey('LIVE');
    await way.expect();
    const load = way.load();
    assert.deepEqual(await way.expected!.loadWaiting, { libtpmsVersion: '0.9.2' });
    await way.suspend('V2');
    await way.depart();
    await way.commit();
    const grant = await load.grant;
    assert.equal(text(grant.permanent), 'P-suspended');
    assert.equal(text(grant.suspended?.volatile), 'V2');
    assert.deepEqual([grant.epoch, grant.generation, grant.arrived], [2n, 2n, true]);
    await load.worker.connect();
    assert.equal((await load.worker.save('P3')).generation, 3n);
  });

  it('is in the log as a migration, and its going on needs no entry; a later suspension does', async () => {
    const way = journey('LIVE');
    await way.expect();
    const { worker: at, grant } = way.load();
    await way.suspend();
    await way.depart();
    await way.commit();
    await grant;
    await at.connect();
    const from = b.audited.length;
    const restore = { permanent: Buffer.from('P3'), use: { action: 'RESTORE' as const, digest: REFERENCE } };
    await at.saveBody(restore);
    await suspendingSave(at, 'V3');
    await at.saveBody(restore);
    const actions = b.audited.slice(from).map(({ action }) => action);
    assert.deepEqual(actions, ['suspend', 'resume']);
    const named = b.audited.filter(({ facts }) => facts?.migration === way.migrationId.toString('hex'));
    assert.ok(named.some(({ action, vtpm }) => action === 'migrate-commit' && vtpm === way.id));
  });

  it('goes on at the source where the destination says ABORT', async () => {
    const way = journey('LIVE');
    await way.expect();
    await way.suspend('V2');
    await way.depart();
    await assert.rejects(
      a.worker(worker.vtpm).load({ expectedEpoch: 1n, verbs: ['RESUME'] }),
      refused('migrating'),
    );
    const signed = await way.ask();
    assert.equal(decisionIn(signed).verdict, 'ABORT');
    await a.registry.departures.abort(way.id, signed);
    const next = a.worker(worker.vtpm);
    const grant = await next.load({ expectedEpoch: 2n, verbs: ['RESUME'] });
    assert.equal(text(grant.suspended?.volatile), 'V2');
    assert.deepEqual([grant.epoch, grant.arrived], [3n, true]);
    await assert.rejects(way.commit(), refused('migration-aborted'));
  });

  it('goes on by itself in the run of its VM alone: a VM that was powered on since has other PCRs', async () => {
    const way = await moved('LIVE');
    const same = b.worker(worker.vtpm);
    assert.equal((await same.load({ expectedEpoch: 2n, verbs: ['RESUME'] })).arrived, true);
    const vmRunId = Buffer.alloc(16, 2);
    const other = b.worker(worker.vtpm);
    const grant = await other.load({ expectedEpoch: 3n, verbs: ['RESUME'], vmRunId });
    assert.deepEqual([grant.arrived, text(grant.suspended?.volatile)], [false, 'V']);
    assert.equal((await b.registry.view(way.id)).header.epoch, 4n);
  });

  it('is put under the next generation of the root key wherever it is: here, on its way, gone', async () => {
    const way = journey('LIVE');
    await way.expect();
    const load = way.load();
    await way.suspend('V2');
    await way.depart();
    const rotate = async (world: World, generation: number): Promise<void> => {
      world.keys.advance(deriveRootKeys(randomBytes(32), world.keys.storeId, generation));
      await world.registry.rekey(way.id);
      await world.registry.arrivals.rekey();
      await world.trust.rekey();
      world.keys.forgetOlder();
      await world.restart();
    };
    await rotate(a, 2);
    assert.ok((await a.registry.view(way.id)).header.departure);
    await a.registry.departures.commit(way.id, await way.commit());
    await load.grant;
    await rotate(a, 3);
    assert.equal((await a.registry.view(way.id)).header.kind, 'MOVED');
    await rotate(b, 2);
    const grant = await b.worker(worker.vtpm).load({ expectedEpoch: 2n, verbs: ['RESUME'] });
    assert.equal(text(grant.suspended?.volatile), 'V2');
    assert.deepEqual(Buffer.from(grant.referenceKey!), Buffer.from(worker.session!.grant.referenceKey!));
    assert.equal(b.registry.arrivals.unsettled().length, 1);
  });

  it('comes back to where it was, and a reference from before is good', async () => {
    const first = await moved('LIVE');
    const at = b.worker(worker.vtpm);
    const granted = await at.load({ expectedEpoch: 2n, verbs: ['RESUME'] });
    assert.deepEqual(Buffer.from(granted.referenceKey!), Buffer.from(worker.session!.grant.referenceKey!));
    await at.connect();
    const back = new Journey(b, a, at, 'LIVE');
    await back.expect();
    const load = back.load();
    await back.suspend();
    await back.depart();
    await b.registry.departures.commit(back.id, await back.commit());
    const grant = await load.grant;
    assert.deepEqual([grant.epoch, grant.generation], [4n, 3n]);
    assert.deepEqual(Buffer.from(grant.referenceKey!), Buffer.from(worker.session!.grant.referenceKey!));
    const { header } = await a.registry.view(first.id);
    assert.deepEqual(
      header.lineage.map((stay) => Buffer.from(stay.host)),
      [idOf(a), idOf(b)],
    );
    assert.deepEqual([a.registry.census.live, a.registry.census.moved, b.registry.census.moved], [1, 0, 1]);
  });

  it('is held for nobody whose migration is another one', async () => {
    const way = journey('OFFLINE');
    await way.expect();
    await assert.rejects(
      b.registry.arrivals.abort({
        migrationId: way.migrationId,
        source: randomBytes(32),
        vtpmUuid: worker.vtpm.uuid,
        epoch: 1n,
        generation: 1n,
      }),
      refused('unknown-migration'),
    );
    await assert.rejects(
      b.registry.arrivals.expect(await new Journey(a, b, worker, 'LIVE').hello(), peerOf(a)),
      refused('busy'),
    );
  });
});
