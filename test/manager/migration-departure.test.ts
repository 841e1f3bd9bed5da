import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import type { ManagerErrorCode } from 'vtpm-manager';
import { BackupControl } from 'vtpm-manager/backup/control';
import { entryMessage, sha256 } from 'vtpm-manager/backup/format';
import { movedAway, restoredRecord, resume, retire } from 'vtpm-manager/records/index';
import { encode, type MigrateOrder, type MigrationDecision } from 'vtpm-proto';
import { unwatched } from '../support/test-keys.js';
import { copyOfDisk, idOf, Journey, REFERENCE, suspendingSave } from './migration-fixture.js';
import { RecordedLink, refused, type Worker, World } from './ownership-fixture.js';

describe('a vTPM that leaves', () => {
  let a: World;
  let b: World;
  let worker: Worker;
  let way: Journey;
  const { abort, commit, check, suspend } = {
    abort: (...args: Parameters<World['registry']['departures']['abort']>) =>
      a.registry.departures.abort(...args),
    commit: (...args: Parameters<World['registry']['departures']['commit']>) =>
      a.registry.departures.commit(...args),
    check: (changes: Partial<MigrateOrder> = {}) => a.registry.departures.check(order(changes)),
    suspend: (limitMs: number) => a.registry.departures.suspend(way.id, limitMs),
  };
  beforeEach(async () => {
    a = await World.create();
    b = await World.create();
    worker = await a.manufactured();
    way = new Journey(a, b, worker, 'LIVE');
  });

  function order(changes: Partial<MigrateOrder>): MigrateOrder {
    return {
      format: 1,
      managerId: a.managerId,
      toolstackKey: a.toolstack.key.publicKey,
      vtpmUuid: worker.vtpm.uuid,
      vmUuid: worker.vtpm.vmUuid,
      destination: idOf(b),
      expectedEpoch: 1n,
      leastGeneration: 1n,
      migrationId: way.migrationId,
      bootId: randomBytes(16),
      expiresAtMonotonicMs: 0n,
      mode: 'LIVE',
      dryRun: false,
      description: new Uint8Array(0),
      ...changes,
    };
  }

  const header = async () => (await a.registry.view(way.id)).header;
  const frozen = async (): Promise<void> => {
    await way.suspend();
    await way.depart();
  };

  it('goes as ordered, or is refused by name', async () => {
    const { epoch, generation, isConnected, isSuspended } = await check();
    assert.deepEqual([epoch, generation, isConnected, isSuspended], [1n, 1n, true, false]);
    const cases: [Partial<MigrateOrder>, ManagerErrorCode][] = [
      [{ vmUuid: randomBytes(16) }, 'wrong-vm'],
      [{ expectedEpoch: 2n }, 'stale-epoch'],
      [{ leastGeneration: 2n }, 'rollback-detected'],
      [{ mode: 'OFFLINE' }, 'busy'],
      [{ destination: idOf(a) }, 'bad-request'],
      [{ vtpmUuid: randomBytes(16) }, 'unknown-vtpm'],
    ];
    for (const [changes, code] of cases) await assert.rejects(check(changes), refused(code));
    await assert.rejects(
      check({ vtpmUuid: randomBytes(16) }),
      /it never ran: start it once, or create it on/,
    );
    const empty = a.worker();
    await empty.load();
    await assert.rejects(
      check({ vtpmUuid: empty.vtpm.uuid, vmUuid: empty.vtpm.vmUuid }),
      refused('migration-refused'),
    );
  });

  it('stays where its worker does not stop in time, or goes', async () => {
    await assert.rejects(suspend(20), refused('migration-aborted'));
    const late = suspend(60_000);
    worker.stream!.detach();
    await assert.rejects(late, refused('migration-aborted'));
    assert.equal(await suspend(60_000), 'none');
    await assert.rejects(way.depart(), refused('migration-aborted'));
    assert.equal((await header()).departure, undefined);
  });

  it('stays where what answers is the FROZEN of an earlier FREEZE', async () => {
    const first = suspend(60_000);
    const old = worker.link.frames.at(-1)!;
    const second = suspend(200);
    await assert.rejects(first, refused('migration-aborted'));
    await worker.stream!.receive(
      worker.session!.cipher.sealWorker('FROZEN', old.sequence, new Uint8Array(0)),
    );
    await assert.rejects(second, refused('migration-aborted'));
  });

  it('stays where its worker went on after it had stopped', async () => {
    await way.suspend();
    await worker.saveBody({ permanent: Buffer.from('on'), use: { action: 'TAKE_BACK', digest: REFERENCE } });
    await assert.rejects(way.depart(), refused('migration-aborted'));
    await worker.save('and on');
    // Nor does a later attempt take that FROZEN for its own.
    await assert.rejects(way.depart(), refused('migration-aborted'));
    // The same where nothing was suspended, since its TPM was off.
    await way.suspend('');
    await worker.save('and on again');
    await assert.rejects(way.depart(), refused('migration-aborted'));
  });

  it('stays in mode VMM where its VMM has not taken it out', async () => {
    way = new Journey(a, b, worker, 'VMM');
    await way.suspend('');
    await assert.rejects(way.depart(), refused('incomplete'));
  });

  it('goes live without volatile state where it was off', async () => {
    await way.suspend('');
    const { parts, header: went } = await way.depart();
    assert.deepEqual([parts.VOLATILE, went.referenceDigest.length], [undefined, 0]);
  });

  it('waits for the VMM to take it out', async () => {
    const gone = new AbortController();
    const out = a.registry.departures.awaitSuspend(way.id, gone.signal);
    await suspendingSave(worker, 'V');
    await out;
    await a.registry.departures.awaitSuspend(way.id, gone.signal);
    const other = await a.manufactured();
    const never = a.registry.departures.awaitSuspend(other.vtpm.id, gone.signal);
    gone.abort();
    await assert.rejects(never, refused('migration-aborted'));
  });

  it("I-3 is nobody's from then on: no Load, no Save, no link, no retirement, no restore", async () => {
    await frozen();
    assert.equal(worker.link.frames.at(-1)!.type, 'FENCED');
    await assert.rejects(worker.save('after'), refused('fenced'));
    await assert.rejects(
      a.registry.attach(worker.session!.firstFrame(), new RecordedLink(), {}),
      refused('fenced'),
    );
    for (const verbs of [['RESUME'], ['COLD'], ['MANUFACTURE']] as const) {
      const next = a.worker(worker.vtpm);
      await assert.rejects(next.load({ expectedEpoch: 1n, verbs: [...verbs] }), refused('migrating'));
    }
    await assert.rejects(a.registry.retire(way.id, 'manager'), refused('migrating'));
    await assert.rejects(check(), refused('migrating'));
    await assert.rejects(way.depart(), refused('migrating'));
  });

  it("I-3 is nobody's after a restart either, and is known to be on its way", async () => {
    await frozen();
    await a.restart();
    await assert.rejects(
      a.worker(worker.vtpm).load({ expectedEpoch: 1n, verbs: ['RESUME'] }),
      refused('migrating'),
    );
    const [pending] = await a.registry.departures.pending();
    assert.deepEqual([pending?.vtpmUuid, pending?.epoch, pending?.generation], [way.id, 1n, 2n]);
    assert.deepEqual(Buffer.from(pending!.departure.migrationId), way.migrationId);
    await abort(way.id, way.forged('ABORT'));
    assert.deepEqual(await a.registry.departures.pending(), []);
    await a.restart();
    assert.deepEqual(await a.registry.departures.pending(), []);
  });

  it('I-5 is counted before it is said that it left', async () => {
    await way.suspend();
    const before = await copyOfDisk(a);
    await way.depart();
    assert.equal(await before.isNewest(), false);
  });

  it('I-5 is counted before it is said that it stays, or that it has moved', async () => {
    await frozen();
    let before = await copyOfDisk(a);
    await abort(way.id, way.forged('ABORT'));
    assert.equal(await before.isNewest(), false);
    const again = await reload();
    way = new Journey(a, b, again, 'LIVE');
    await frozen();
    before = await copyOfDisk(a);
    await commit(way.id, way.forged('COMMIT'));
    assert.equal(await before.isNewest(), false);
  });

  it('I-3 stays only on an ABORT of this very departure, signed by its destination', async () => {
    await frozen();
    const wrong: Partial<MigrationDecision>[] = [
      { verdict: 'COMMIT' },
      { migrationId: randomBytes(16) },
      { source: randomBytes(32) },
      { vtpmUuid: randomBytes(16) },
      { epoch: 2n },
      { generation: 1n },
      { generation: 3n },
    ];
    for (const changes of wrong) await assert.rejects(abort(way.id, way.forged('ABORT', changes)));
    await assert.rejects(abort(way.id, way.forged('ABORT', {}, a)), refused('decision-forged'));
    await assert.rejects(
      abort(way.id, way.forged('ABORT', { destination: idOf(a) }, a)),
      refused('decision-forged'),
    );
    assert.ok((await header()).departure);
    await abort(way.id, way.forged('ABORT'));
    assert.equal((await header()).departure, undefined);
  });

  it('I-3 an ABORT of an earlier attempt ends no later one', async () => {
    way = new Journey(a, b, worker, 'OFFLINE');
    await way.depart();
    const old = way.forged('ABORT');
    await abort(way.id, old);
    // The same id, and nothing was saved since.
    await way.depart();
    await assert.rejects(abort(way.id, old), refused('decision-forged'));
    assert.ok((await header()).departure);
  });

  it('leaves nothing behind but where it is', async () => {
    await frozen();
    await assert.rejects(commit(way.id, way.forged('ABORT')), refused('bad-request'));
    await commit(way.id, way.forged('COMMIT'));
    const stone = await header();
    assert.deepEqual([stone.kind, stone.epoch, stone.generation], ['MOVED', 1n, 2n]);
    assert.equal(stone.checkpointKey, undefined);
    assert.equal(stone.referenceKey, undefined);
    assert.equal(stone.suspension, undefined);
    assert.ok(stone.retirement);
    await commit(way.id, way.forged('COMMIT'));
    await assert.rejects(abort(way.id, way.forged('ABORT')), refused('unknown-migration'));
    await assert.rejects(
      a.worker(worker.vtpm).load({ expectedEpoch: 1n, verbs: ['MANUFACTURE'] }),
      refused('moved'),
    );
    await assert.rejects(check(), refused('moved'));
    await a.registry.retire(way.id, 'manager');
    assert.equal((await header()).kind, 'RETIRED');
    assert.deepEqual((await header()).retirement, stone.retirement);
    assert.deepEqual([a.registry.census.live, a.registry.census.moved, a.registry.census.retired], [0, 0, 1]);
  });

  it('has no end where it did not begin: unknown-migration', async () => {
    way.frozen = { epoch: 1n, generation: 1n };
    await assert.rejects(abort(way.id, way.forged('ABORT')), refused('unknown-migration'));
    await assert.rejects(commit(way.id, way.forged('COMMIT')), refused('unknown-migration'));
    const strange = new Journey(a, b, a.worker(), 'LIVE');
    strange.frozen = way.frozen;
    await assert.rejects(abort(strange.id, strange.forged('ABORT')), refused('unknown-vtpm'));
  });

  it('I-3 does not come back by an accepted rollback, which changes nothing of what its destination is asked', async () => {
    await frozen();
    const record = (await a.registry.record(way.id))!;
    const accepted = resume(record, 'rolled-back', 9n);
    assert.deepEqual(accepted.header.departure, record.header.departure);
    assert.ok(accepted.header.generation > record.header.generation);
    const stone = movedAway(accepted, accepted.header.departure!, 1n).header;
    assert.deepEqual([stone.epoch, stone.generation], [1n, 2n]);
  });

  it('a tombstone that is retired says where it had moved', async () => {
    await frozen();
    const { departure } = await header();
    const stone = movedAway((await a.registry.record(way.id))!, departure!, 5n);
    const retired = retire(stone, 9n).header;
    assert.deepEqual([retired.kind, retired.retirement?.at], ['RETIRED', 5n]);
    assert.deepEqual(retired.departure, departure);
  });

  describe('and a backup', () => {
    /** What the CLI sends of a backup that was made when the vTPM was `kind`. */
    function request(kind: 'LIVE' | 'MOVED', changes: object = {}): Buffer {
      const { keys } = a;
      const headerDigest = randomBytes(32);
      const content =
        kind === 'LIVE'
          ? encode('BackupContent', { salt: randomBytes(32), permanent: Buffer.from('old') })
          : undefined;
      const facts = encode('BackupFacts', {
        index: 0,
        vtpmUuid: worker.vtpm.uuid,
        vmUuid: worker.vtpm.vmUuid,
        kind,
        generation: 1n,
        epoch: 1n,
        marks: [],
        libtpmsVersion: '0.9.2',
        savedAt: 1n,
        createdAt: 1n,
        size: 3,
        contentDigest: content ? sha256(content) : new Uint8Array(0),
        unsettled: [],
        lineage: [],
        ...changes,
      });
      const signature = keys.backupKey.sign(entryMessage(headerDigest, facts));
      return encode('RestoreRequest', { headerDigest, facts, signature, ...(content && { content }) });
    }

    function control(): BackupControl {
      const { keys, store, registry } = a;
      return new BackupControl({ paths: {} as never, keys, store, registry, audit: unwatched.audit });
    }

    it('I-3 is not restored while it is on its way, nor when it has moved: migrating, moved', async () => {
      await frozen();
      await assert.rejects(control().restore('manager', request('LIVE')), refused('migrating'));
      await commit(way.id, way.forged('COMMIT'));
      await assert.rejects(control().restore('manager', request('LIVE')), refused('moved'));
      assert.equal((await control().restore('manager', request('MOVED'))).action, 'nothing');
      assert.equal((await header()).kind, 'MOVED');
    });

    it('I-3 of one on its way brings it back on its way', async () => {
      await frozen();
      const { departure } = await header();
      const facts = {
        vtpmUuid: worker.vtpm.uuid,
        vmUuid: worker.vtpm.vmUuid,
        kind: 'LIVE' as const,
        generation: 2n,
        epoch: 1n,
        marks: [],
        libtpmsVersion: '0.9.2',
        savedAt: 1n,
        createdAt: 1n,
      };
      const { header: back } = restoredRecord(
        a.keys,
        { ...facts, departure: departure! },
        Buffer.from('P'),
        undefined,
        3n,
      );
      assert.deepEqual(back.departure, departure);
      assert.equal(back.session, undefined);
      const held = { ...back, lineage: [], unsettled: [] };
      assert.equal(
        restoredRecord(a.keys, { ...facts, departure: departure! }, Buffer.from('P'), held, 3n).header
          .departure,
        undefined,
      );
    });

    it('of one that had moved is a tombstone that says where to', async () => {
      await frozen();
      const { departure } = await header();
      const { keys } = a;
      a = await World.create(keys);
      assert.equal((await control().restore('manager', request('MOVED', { departure }))).action, 'retire');
      assert.deepEqual((await header()).departure, departure);
      await assert.rejects(a.worker(worker.vtpm).load({ expectedEpoch: 0n }), refused('moved'));
    });
  });

  async function reload(): Promise<Worker> {
    const next = a.worker(worker.vtpm);
    await next.load({ expectedEpoch: (await header()).epoch, verbs: ['RESUME'] });
    await next.connect();
    return next;
  }
});
