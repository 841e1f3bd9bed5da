import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import fc from 'fast-check';
import { ManagerError, type ManagerErrorCode } from 'vtpm-manager';
import { deriveRootKeys } from 'vtpm-manager/keys/index';
import { PART_LIMITS, type TravellingState } from 'vtpm-manager/records/index';
import type { MigrationHello, Stay } from 'vtpm-proto';
import { storeFull } from '../support/memory-store.js';
import { testVtpm } from '../support/worker-client.js';
import { copyOfDisk, decisionIn, idOf, Journey, peerOf, REFERENCE } from './migration-fixture.js';
import { refused, type Worker, World } from './ownership-fixture.js';

const text = (bytes: Uint8Array | undefined): string | undefined =>
  bytes && Buffer.from(bytes).toString('utf8');

describe('a vTPM that comes', () => {
  let a: World;
  let b: World;
  let worker: Worker;
  let way: Journey;
  beforeEach(async () => {
    a = await World.create();
    b = await World.create();
    worker = await a.manufactured();
    way = new Journey(a, b, worker, 'LIVE');
  });

  const arrivals = () => b.registry.arrivals;
  const here = async () => (await b.registry.record(way.id))?.header;
  /** Frozen at the source, a worker waits at the destination. */
  async function ready() {
    await way.expect();
    const load = way.load();
    await way.expected!.loadWaiting;
    await way.suspend('V2');
    await way.depart();
    return load;
  }
  async function came() {
    const load = await ready();
    const signed = await way.commit();
    return { signed, grant: await load.grant, load };
  }

  describe('has a place', () => {
    async function isRefused(code: ManagerErrorCode, changes: Partial<MigrationHello> = {}): Promise<void> {
      await assert.rejects(arrivals().check(await way.hello(changes), peerOf(a)), refused(code));
      await assert.rejects(way.expect(changes), refused(code));
      assert.equal(arrivals().placeOf(way.id), undefined);
    }

    it('unless it lives here, was retired here, or is on its way from here', async () => {
      const twin = await b.manufactured(worker.vtpm);
      await isRefused('migration-refused');
      const back = new Journey(b, a, twin, 'OFFLINE');
      await back.depart();
      await isRefused('migrating');
      await b.registry.departures.commit(back.id, back.forged('COMMIT'));
      await isRefused('rollback-detected');
      await b.registry.retire(way.id, 'manager');
      await isRefused('retired', { epoch: 9n, generation: 9n });
    });

    it("I-5 unless it is older than when it left here, or another VM's", async () => {
      const twin = await b.manufactured(worker.vtpm);
      await twin.save('P2');
      const back = new Journey(b, a, twin, 'OFFLINE');
      await back.depart();
      await b.registry.departures.commit(back.id, back.forged('COMMIT'));
      // It left at epoch 1 and generation 2.
      await isRefused('rollback-detected', { epoch: 1n, generation: 2n });
      await isRefused('rollback-detected', { epoch: 2n, generation: 1n });
      await isRefused('wrong-vm', { epoch: 2n, generation: 2n, vmUuid: randomBytes(16) });
      await way.expect({ epoch: 2n, generation: 2n });
    });

    it('once, and so many of each peer', async () => {
      await way.expect();
      const hello = await way.hello();
      await assert.rejects(arrivals().expect(hello, peerOf(a)), refused('busy'));
      for (let i = 0; i < 31; i++) {
        await arrivals().expect(
          { ...hello, vtpmUuid: randomBytes(16), migrationId: randomBytes(16) },
          peerOf(a),
        );
      }
      const more = { ...hello, vtpmUuid: randomBytes(16), migrationId: randomBytes(16) };
      await assert.rejects(arrivals().expect(more, peerOf(a)), refused('busy'));
      await arrivals().expect(more, { hostId: randomBytes(32) });
      way.expected!.release(refusedBy());
      await arrivals().expect(
        { ...more, vtpmUuid: randomBytes(16), migrationId: randomBytes(16) },
        peerOf(a),
      );
    });

    it('once for each migration id, for ever', async () => {
      await way.expect();
      way.expected!.release(refusedBy());
      await assert.rejects(way.expect(), refused('migration-aborted'));
      await b.restart();
      await assert.rejects(way.expect(), refused('migration-aborted'));
      assert.equal(arrivals().placeOf(way.id), undefined);
    });

    it('not with a disk that is full: nothing is promised, nothing is held', async () => {
      b.disk.beforeCommit = storeFull;
      await assert.rejects(way.expect(), refused('store-full'));
      assert.equal(arrivals().placeOf(way.id), undefined);
    });

    it('I-5 and the promise that it comes to nothing is counted before the place is given', async () => {
      const before = await copyOfDisk(b);
      await way.expect();
      assert.equal(await before.isNewest(), false);
    });
  });

  describe('has a Load that waits', () => {
    it('of a ticket for the epoch, the VM and the run that its source names, with the verb resume', async () => {
      await way.expect();
      const cases: [Parameters<Journey['load']>[0], ManagerErrorCode][] = [
        [{ expectedEpoch: 0n }, 'stale-epoch'],
        [{ expectedEpoch: 2n }, 'stale-epoch'],
        [{ vmRunId: Buffer.alloc(16, 5) }, 'wrong-vm'],
        [{ verbs: ['COLD'] }, 'verb-missing'],
        [{ verbs: ['MANUFACTURE'] }, 'already-manufactured'],
      ];
      for (const [changes, code] of cases) await assert.rejects(way.load(changes).grant, refused(code));
      const stranger = new Journey(a, b, worker, 'LIVE').load();
      assert.ok(stranger.extended >= 0);
      const other = b.worker({ ...testVtpm(way.id) });
      await assert.rejects(other.load({ expectedEpoch: 1n, verbs: ['RESUME'] }), refused('wrong-vm'));
    });

    it('but none in mode OFFLINE, and none makes a new TPM in its place', async () => {
      way = new Journey(a, b, worker, 'OFFLINE');
      await way.expect();
      await assert.rejects(way.load().grant, refused('migrating'));
      await assert.rejects(
        way.load({ expectedEpoch: 0n, verbs: ['MANUFACTURE'] }).grant,
        refused('stale-epoch'),
      );
    });

    it('for longer than other Loads, and hears why it does not come', async () => {
      await way.expect();
      const load = way.load();
      await way.expected!.loadWaiting;
      assert.ok(load.extended > 60_000);
      way.expected!.release(refusedBy());
      await assert.rejects(load.grant, refused('migration-refused'));
      await assert.rejects(way.expected!.loadWaiting.then(() => Promise.reject(refusedBy())));
    });

    it('the newest one, and none of a worker that is gone', async () => {
      await way.expect();
      const first = way.load();
      await way.expected!.loadWaiting;
      const second = way.load();
      await assert.rejects(first.grant, refused('fenced'));
      second.gone.abort();
      await assert.rejects(second.grant, refused('migration-aborted'));
      await way.suspend();
      await way.depart();
      await assert.rejects(way.commit(), refused('migration-aborted'));
      assert.equal(await here(), undefined);
      assert.equal(decisionIn(await way.ask()).verdict, 'ABORT');
    });

    it('and gets the vTPM that is being written for it, whoever comes meanwhile', async () => {
      const load = await ready();
      let late: ReturnType<Journey['load']> | undefined;
      b.disk.beforeCommit = () => {
        late ??= way.load();
      };
      await way.commit();
      assert.equal(text((await load.grant).suspended?.volatile), 'V2');
      await assert.rejects(late!.grant, refused('migrating'));
      await load.worker.connect();
    });

    it('in mode VMM the one that brings the reference; others decide nothing', async () => {
      way = new Journey(a, b, worker, 'VMM');
      await way.expect();
      await way.suspend('V2');
      await way.depart();
      const committed = way.commit();
      await assert.rejects(way.load().grant, refused('wrong-reference'));
      await assert.rejects(way.load({}, Buffer.alloc(32, 1)).grant, refused('wrong-reference'));
      assert.equal(await here(), undefined);
      const load = way.load({}, REFERENCE);
      assert.equal(decisionIn(await committed).verdict, 'COMMIT');
      assert.equal(text((await load.grant).suspended?.volatile), 'V2');
    });

    it('in mode VMM may never come, and then the source gets its ABORT', async () => {
      way = new Journey(a, b, worker, 'VMM');
      await way.expect();
      await way.suspend('V2');
      await way.depart();
      const committed = way.commit();
      const asked = way.ask();
      await assert.rejects(committed, refused('migration-aborted'));
      await a.registry.departures.abort(way.id, await asked);
      assert.equal(await here(), undefined);
    });

    it('is refused when the manager ends', async () => {
      await way.expect();
      const load = way.load();
      await way.expected!.loadWaiting;
      await b.registry.close();
      await assert.rejects(load.grant, refused('shutting-down'));
    });
  });

  it('is refused where something is missing, too large, or of another vTPM; nothing is half there, and an ABORT is said', async () => {
    const edits: [string, ManagerErrorCode, (state: TravellingState) => unknown][] = [
      ['no permanent state', 'incomplete', ({ parts: { PERMANENT: _, ...parts } }) => ({ parts })],
      ['an empty one', 'incomplete', ({ parts }) => ({ parts: { ...parts, PERMANENT: Buffer.alloc(0) } })],
      [
        'a larger one',
        'too-large',
        ({ parts }) => ({ parts: { ...parts, PERMANENT: Buffer.alloc(PART_LIMITS.permanent + 1) } }),
      ],
      ['no volatile state', 'incomplete', ({ parts: { VOLATILE: _, ...parts } }) => ({ parts })],
      [
        'a larger one',
        'too-large',
        ({ parts }) => ({ parts: { ...parts, VOLATILE: Buffer.alloc(PART_LIMITS.volatile + 1) } }),
      ],
      [
        'volatile state of none',
        'incomplete',
        ({ header }) => ({ header: { ...header, referenceDigest: Buffer.alloc(0) } }),
      ],
      [
        'half a digest',
        'bad-request',
        ({ header }) => ({ header: { ...header, referenceDigest: Buffer.alloc(16, 9) } }),
      ],
      ['no reference key', 'incomplete', ({ parts: { REFERENCE_KEY: _, ...parts } }) => ({ parts })],
      ['another VM', 'wrong-vm', ({ header }) => ({ header: { ...header, vmUuid: randomBytes(16) } })],
      ['another run', 'wrong-vm', ({ header }) => ({ header: { ...header, vmRunId: randomBytes(16) } })],
      ['another epoch', 'rollback-detected', ({ header }) => ({ header: { ...header, epoch: 2n } })],
      [
        'an older generation',
        'rollback-detected',
        ({ header }) => ({ header: { ...header, generation: 0n + 1n, suspendedGeneration: 0n } }),
      ],
      ['no past', 'bad-request', ({ header }) => ({ header: { ...header, lineage: [] } })],
      [
        'the past of another',
        'bad-request',
        ({ header }) => ({
          header: { ...header, lineage: lineageOf(header.lineage, { host: randomBytes(32) }) },
        }),
      ],
      [
        'that of another migration',
        'bad-request',
        ({ header }) => ({
          header: { ...header, lineage: lineageOf(header.lineage, { migrationId: randomBytes(16) }) },
        }),
      ],
      [
        'too long a past',
        'bad-request',
        ({ header }) => ({
          header: { ...header, lineage: [...Array(32).fill(header.lineage[0]), header.lineage[0]] },
        }),
      ],
      [
        'too many marks',
        'bad-request',
        ({ header }) => ({ header: { ...header, marks: Array(33).fill('x') } }),
      ],
    ];
    await worker.save('P2');
    for (const [what, code, edit] of edits) {
      way = new Journey(a, b, worker, 'LIVE');
      const load = await ready();
      const state = way.state!;
      Object.assign(way, { state: { ...state, ...(edit(state) as object) } });
      await assert.rejects(way.commit(), refused(code), what);
      assert.equal(await here(), undefined, what);
      await assert.rejects(load.grant, refused(code), what);
      const signed = await way.ask();
      assert.equal(decisionIn(signed).verdict, 'ABORT', what);
      await a.registry.departures.abort(way.id, signed);
      worker = a.worker(worker.vtpm);
      const { header } = await a.registry.view(way.id);
      await worker.load({ expectedEpoch: header.epoch, verbs: ['RESUME'] });
      await worker.connect();
    }
  });

  it('I-5 is counted before it is said that it has come', async () => {
    const load = await ready();
    const before = await copyOfDisk(b);
    await way.commit();
    assert.equal(await before.isNewest(), false);
    await load.grant;
  });

  it('has its bounds in what it keeps of its past: the first host and the newest ones', async () => {
    await ready();
    const { header } = way.state!;
    const past = Array.from({ length: 31 }, () => ({
      ...header.lineage[0]!,
      host: randomBytes(32),
      migrationId: randomBytes(16),
    }));
    Object.assign(way, {
      state: { ...way.state!, header: { ...header, lineage: [...past, header.lineage[0]!] } },
    });
    await way.commit();
    const at = b.worker(worker.vtpm);
    await at.load({ expectedEpoch: 2n, verbs: ['RESUME'] });
    await at.connect();
    const back = new Journey(b, a, at, 'LIVE');
    await back.suspend();
    const { lineage } = (await back.depart()).header;
    assert.deepEqual(
      [lineage.length, hex(lineage[0]!.host), hex(lineage[1]!.host), hex(lineage.at(-1)!.host)],
      [32, hex(past[0]!.host), hex(past[2]!.host), hex(idOf(b))],
    );
  });

  describe('is decided once', () => {
    it('I-3 COMMIT, then nothing else', async () => {
      const { signed } = await came();
      assert.deepEqual(await way.ask(), signed);
      assert.deepEqual(await arrivals().decisionOf(way.migrationId), signed);
      await b.restart();
      assert.deepEqual(await way.ask(), signed);
      assert.deepEqual(await arrivals().decisionOf(way.migrationId), signed);
      await assert.rejects(way.commit(), refused('migration-aborted'));
    });

    it('I-3 ABORT, then nothing else', async () => {
      const load = await ready();
      const signed = await way.ask();
      assert.equal(decisionIn(signed).verdict, 'ABORT');
      await assert.rejects(load.grant, refused('migration-aborted'));
      await assert.rejects(way.commit(), refused('migration-aborted'));
      await b.restart();
      assert.deepEqual(await way.ask(), signed);
      assert.equal(await arrivals().decisionOf(way.migrationId), undefined);
      assert.equal(await here(), undefined);
    });

    it('I-3 where both are asked for at once, by whoever is first', async () => {
      await fc.assert(
        fc.asyncProperty(fc.boolean(), fc.nat(6), async (commitsFirst, turns) => {
          a = await World.create();
          b = await World.create();
          worker = await a.manufactured();
          way = new Journey(a, b, worker, 'LIVE');
          await ready();
          const run = [() => way.commit(), () => way.ask()];
          if (!commitsFirst) run.reverse();
          const first = run[0]!().catch((error: unknown) => error);
          for (let i = 0; i < turns; i++) await Promise.resolve();
          const second = run[1]!().catch((error: unknown) => error);
          const both = await Promise.all([first, second]);
          const [committed, asked] = commitsFirst ? both : both.reverse();
          const verdict = decisionIn(asked as Parameters<typeof decisionIn>[0]).verdict;
          assert.equal((await here()) !== undefined, verdict === 'COMMIT');
          if (verdict === 'COMMIT') assert.deepEqual(committed, asked);
          else refused('migration-aborted')(committed);
        }),
        { numRuns: 20 },
      );
    });

    it('I-3 for its source alone', async () => {
      await came();
      const stranger = { ...way.inquiry(), source: randomBytes(32) };
      await assert.rejects(arrivals().abort(stranger), refused('unknown-migration'));
      await arrivals().settled(way.migrationId, randomBytes(32));
      assert.equal(arrivals().unsettled().length, 1);
    });

    it('ABORT for what it never heard of', async () => {
      way.frozen = { epoch: 7n, generation: 8n };
      const decision = decisionIn(await way.ask());
      assert.deepEqual([decision.verdict, decision.epoch, decision.generation], ['ABORT', 7n, 8n]);
      // And it is never begun.
      await assert.rejects(way.expect(), refused('migration-aborted'));
    });

    it('ABORT with a disk that is full: the promise was made before', async () => {
      const load = await ready();
      b.disk.beforeCommit = storeFull;
      await assert.rejects(way.commit(), refused('store-full'));
      assert.equal(await here(), undefined);
      await assert.rejects(load.grant, refused('store-full'));
      const signed = await way.ask();
      assert.equal(decisionIn(signed).verdict, 'ABORT');
      await a.registry.departures.abort(way.id, signed);
    });

    it('I-3 COMMIT where the answer was lost with the store', async () => {
      await ready();
      const { disk } = b;
      const commit = disk.commit.bind(disk);
      disk.commit = async (writes) => {
        await commit(writes);
        throw new Error('the store process is gone');
      };
      await assert.rejects(way.commit());
      await assert.rejects(way.ask());
      disk.commit = commit;
      await b.restart();
      assert.equal(decisionIn(await way.ask()).verdict, 'COMMIT');
    });
  });

  describe('is settled', () => {
    it('when its source says so; what was decided is known after that too', async () => {
      const { signed } = await came();
      assert.equal(arrivals().unsettled().length, 1);
      await arrivals().settled(way.migrationId, idOf(a));
      assert.deepEqual(arrivals().unsettled(), []);
      assert.equal(await arrivals().decisionOf(way.migrationId), undefined);
      await b.restart();
      assert.deepEqual(arrivals().unsettled(), []);
      assert.deepEqual(await way.ask(), signed);
    });

    it('between two saves of the worker that has it', async () => {
      const { load } = await came();
      await load.worker.connect();
      await load.worker.save('P3');
      await arrivals().settled(way.migrationId, idOf(a));
      assert.deepEqual((await here())?.unsettled, []);
      assert.equal((await load.worker.save('P4')).generation, 4n);
    });

    it('I-3 and a source with a disk from before gets no ABORT, however long ago that was', async () => {
      const { load, grant } = await came();
      await arrivals().settled(way.migrationId, idOf(a));
      // Forgotten in the past that is kept.
      const held = (await b.registry.record(way.id))!;
      await load.worker.connect();
      const back = new Journey(b, a, load.worker, 'LIVE');
      await back.suspend();
      await back.depart();
      await b.registry.departures.commit(back.id, back.forged('COMMIT'));
      assert.equal(held.header.lineage.length, 1);
      const old = { ...way.inquiry(), migrationId: randomBytes(16) };
      await assert.rejects(arrivals().abort(old), refused('in-doubt'));
      assert.equal(grant.epoch, 2n);
    });

    it('by coming from there again', async () => {
      await came();
      const at = b.worker(worker.vtpm);
      await at.load({ expectedEpoch: 2n, verbs: ['RESUME'] });
      await at.connect();
      await a.registry.departures.commit(way.id, way.forged('COMMIT'));
      const back = new Journey(b, a, at, 'OFFLINE');
      await back.expect();
      await back.depart();
      await b.registry.departures.commit(back.id, await back.commit());
      assert.equal((await b.registry.view(way.id)).header.unsettled.length, 1);
      const again = a.worker(worker.vtpm);
      await again.load({ expectedEpoch: 4n, verbs: ['COLD'] });
      const third = new Journey(a, b, again, 'OFFLINE');
      await third.expect();
      await third.depart();
      await third.commit();
      const { unsettled } = (await here())!;
      assert.deepEqual(
        unsettled.map(({ migrationId }) => hex(migrationId)),
        [hex(third.migrationId)],
      );
    });
  });

  it('I-5 keeps what it is for ever: marks, when it was made, its generation', async () => {
    worker = a.worker(worker.vtpm);
    await worker.load({ expectedEpoch: 1n, verbs: ['RESUME', 'EXPORT'] });
    await worker.connect();
    await worker.saveBody({ permanent: Buffer.from('P2'), use: { action: 'EXPORT', digest: REFERENCE } });
    way = new Journey(a, b, worker, 'LIVE');
    const before = (await a.registry.view(way.id)).header;
    assert.deepEqual(before.marks, ['plain-export']);
    await came();
    const after = (await here())!;
    assert.deepEqual(
      [after.marks, after.createdAt, after.vmUuid],
      [before.marks, before.createdAt, Buffer.from(before.vmUuid)],
    );
    assert.ok(after.generation > before.generation);
  });

  it('is rekeyed with what was promised', async () => {
    await ready();
    const { keys } = b;
    keys.advance(deriveRootKeys(randomBytes(32), keys.storeId, 2));
    await arrivals().rekey();
    await b.trust.rekey();
    keys.forgetOlder();
    await b.restart();
    await assert.rejects(way.expect(), refused('migration-aborted'));
    assert.equal(decisionIn(await way.ask()).verdict, 'ABORT');
  });
});

function lineageOf(lineage: readonly Stay[], changes: Partial<Stay>): Stay[] {
  return lineage.map((stay) => ({ ...stay, ...changes }));
}

function refusedBy(): ManagerError {
  return new ManagerError('migration-refused', 'the toolstack does not want it');
}

function hex(bytes: Uint8Array): string {
  return Buffer.from(bytes).toString('hex');
}
