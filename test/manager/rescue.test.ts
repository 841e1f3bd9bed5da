import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { createLogger } from 'vtpm-common';
import { ManagerError } from 'vtpm-manager';
import { EMPTY_HEAD } from 'vtpm-manager/audit/index';
import { openEntry, readBackup } from 'vtpm-manager/backup/read';
import { writeBackup } from 'vtpm-manager/backup/write';
import { ACCEPTANCE_KEY, acceptanceRecord } from 'vtpm-manager/ownership/acceptance';
import { RescueControl } from 'vtpm-manager/rescue/control';
import {
  boxKeyPair,
  encode,
  type FencingStatement,
  type RestoreRequest,
  type SignedFencing,
  type SignedRescue,
  signFencing,
} from 'vtpm-proto';
import { testPeer } from '../support/test-peer.js';
import { type TestVtpm, testVtpm } from '../support/worker-client.js';
import { copyOfDisk, idOf, Journey } from './migration-fixture.js';
import { refused, type Worker, World } from './ownership-fixture.js';

const EPOCHS = 1n << 32n;
const operator = boxKeyPair();
const log = createLogger('test', { 'log-level': 'silent', 'log-format': 'json' });

/** The entry of one vTPM in a backup that a host made. */
async function backedUp(world: World, { id }: TestVtpm): Promise<RestoreRequest> {
  const directory = mkdtempSync(join(tmpdir(), 'vtpm-rescue-'));
  try {
    const chunks: Buffer[] = [];
    for await (const chunk of writeBackup({
      keys: world.keys,
      ids: [id],
      recipient: operator.publicKey,
      anchor: { root: Buffer.alloc(32), counter: 1n },
      enrolment: Buffer.from('{}'),
      approvals: Buffer.alloc(0),
      backupId: randomBytes(16),
      record: (name) => world.registry.record(name),
    })) {
      chunks.push(chunk);
    }
    const file = join(directory, 'backup');
    writeFileSync(file, Buffer.concat(chunks));
    let request: RestoreRequest | undefined;
    await readBackup(file, (start, entry) => {
      const { facts, signature, envelope } = entry;
      const content = envelope.length > 0 ? openEntry(operator.secretKey, start, entry) : undefined;
      request = { headerDigest: start.digest, facts, signature, ...(content && { content }) };
    });
    assert.ok(request);
    return request;
  } finally {
    rmSync(directory, { recursive: true });
  }
}

/** A host with what it rescues. */
class Rescuer {
  told = 0;
  readonly control: RescueControl;

  constructor(readonly world: World) {
    this.control = new RescueControl({
      keys: world.keys,
      trust: world.trust,
      registry: world.registry,
      audit: {
        append: async (event) => {
          world.audited.push(event);
          return EMPTY_HEAD;
        },
      },
      log,
      onHeld: () => {
        this.told += 1;
      },
    });
  }

  static async create(): Promise<Rescuer> {
    return new Rescuer(await World.create());
  }

  async know(...others: readonly Rescuer[]): Promise<void> {
    for (const [index, { world }] of others.entries()) {
      const { hostKey, backupKey } = world.keys;
      const keys = { hostId: hostKey.publicKey, backupKey: backupKey.publicKey };
      await this.world.trust.addPeer(testPeer({ name: `host${index}`, ...keys }));
    }
  }

  request(
    restore: RestoreRequest,
    dead: Rescuer,
    vtpm: TestVtpm,
    changes: Partial<FencingStatement> = {},
  ): Buffer {
    return encode('RescueRequest', { restore, fencing: this.fencing(dead, vtpm, changes) });
  }

  fencing(dead: Rescuer, vtpm: TestVtpm, changes: Partial<FencingStatement> = {}): SignedFencing {
    const { key } = this.world.toolstack;
    return signFencing(key, {
      format: 1,
      toolstackKey: key.publicKey,
      vtpmUuid: vtpm.uuid,
      host: idOf(dead.world),
      lastGeneration: 9n,
      method: 'its power was cut',
      at: BigInt(Date.now()),
      ...changes,
    });
  }

  rescue(request: Uint8Array) {
    return this.control.rescue({ uid: 0 }, request);
  }

  async header(vtpm: TestVtpm) {
    return (await this.world.registry.view(vtpm.id)).header;
  }

  /** Verdicts of the log, of rescues. */
  get verdicts(): string[] {
    return this.world.audited.filter(({ action }) => action === 'rescue').map(({ verdict }) => verdict);
  }
}

describe('a rescue', () => {
  let dead: Rescuer;
  let here: Rescuer;
  let vtpm: TestVtpm;
  let worker: Worker;
  let backup: RestoreRequest;

  beforeEach(async () => {
    [dead, here] = [await Rescuer.create(), await Rescuer.create()];
    await here.know(dead);
    vtpm = testVtpm();
    worker = await dead.world.manufactured(vtpm);
    await worker.save('P2');
    backup = await backedUp(dead.world, vtpm);
    await worker.save('P3');
  });

  /** The notices that `here` holds for the host that was dead. */
  const held = (): Promise<readonly SignedRescue[]> => here.control.held(idOf(dead.world));

  it('goes on from the backup: marked, far above every epoch and generation, to be powered on', async () => {
    const plan = await here.control.plan(here.request(backup, dead, vtpm));
    assert.deepEqual([plan.generation, plan.lastGeneration, plan.epoch], [2n, 9n, undefined]);
    assert.equal(await here.world.registry.record(vtpm.id), undefined);

    await here.rescue(here.request(backup, dead, vtpm));
    const header = await here.header(vtpm);
    assert.deepEqual([header.kind, header.marks, header.session], ['LIVE', ['rescued'], undefined]);
    assert.equal(header.epoch, EPOCHS);
    assert.ok(header.generation > 9n && header.generation % EPOCHS === 2n);
    assert.deepEqual(
      header.lineage.map(({ host, lastGeneration }) => [Buffer.from(host), lastGeneration]),
      [[idOf(dead.world), 9n]],
    );
    assert.deepEqual(here.verdicts, ['intended', 'done']);
    assert.equal(here.world.audited.at(-1)?.facts?.method, 'its power was cut');

    const next = here.world.worker(vtpm);
    const grant = await next.load({ expectedEpoch: EPOCHS, verbs: ['COLD'] });
    assert.equal(Buffer.from(grant.permanent ?? []).toString(), 'P2');
    assert.equal(grant.suspended, undefined);
  });

  it('has been counted by the TPM when it is told, and is there after a crash', async () => {
    const before = await here.world.anchor.counter.read();
    await here.rescue(here.request(backup, dead, vtpm));
    assert.ok((await here.world.anchor.counter.read()) > before);
    await here.world.restart();
    assert.equal((await new Rescuer(here.world).header(vtpm)).epoch, EPOCHS);
  });

  it('is above what the statement knows of, whatever the backup has', async () => {
    const lastGeneration = 77n * EPOCHS + 5n;
    await here.rescue(here.request(backup, dead, vtpm, { lastGeneration }));
    assert.ok((await here.header(vtpm)).generation > lastGeneration);
  });

  it('never happens without a statement, about another host or vTPM, or that knows too little: not-fenced', async () => {
    const third = await Rescuer.create();
    await here.world.trust.addPeer(
      testPeer({ name: 'c', hostId: idOf(third.world), backupKey: third.world.keys.backupKey.publicKey }),
    );
    const none = encode('RescueRequest', { restore: backup });
    const stranger = new Rescuer(third.world).request(backup, dead, vtpm);
    for (const [request, code] of [
      [none, 'not-fenced'],
      [stranger, 'not-fenced'],
      [here.request(backup, dead, testVtpm()), 'not-fenced'],
      [here.request(backup, dead, vtpm, { lastGeneration: 1n }), 'not-fenced'],
      [here.request(backup, dead, vtpm, { at: 1n }), 'not-fenced'],
      [here.request(backup, third, vtpm), 'wrong-manager'],
      [here.request(backup, dead, vtpm, { host: randomBytes(32) }), 'unknown-peer'],
      [here.request(backup, here, vtpm), 'bad-request'],
    ] as const) {
      await assert.rejects(here.rescue(request), refused(code));
      await assert.rejects(here.control.plan(request), refused(code));
    }
    assert.equal(await here.world.registry.record(vtpm.id), undefined);
    assert.deepEqual([...new Set(here.verdicts)], ['refused']);
  });

  it('is refused where the vTPM lives here, was retired here, or there', async () => {
    const mine = await here.world.manufactured(vtpm);
    await assert.rejects(here.rescue(here.request(backup, dead, vtpm)), refused('lives-here'));
    mine.stream?.detach();
    await here.world.registry.retire(vtpm.id, 'manager');
    await assert.rejects(here.rescue(here.request(backup, dead, vtpm)), refused('retired'));
    worker.stream?.detach();
    await dead.world.registry.retire(vtpm.id, 'manager');
    const tombstone = await backedUp(dead.world, vtpm);
    const fresh = await Rescuer.create();
    await fresh.know(dead);
    await assert.rejects(fresh.rescue(fresh.request(tombstone, dead, vtpm)), refused('retired'));
  });

  it('is refused where it went from here to a third host, and where that is in doubt', async () => {
    const third = await Rescuer.create();
    const mine = testVtpm();
    const other = await here.world.manufactured(mine);
    const journey = new Journey(here.world, third.world, other, 'OFFLINE');
    await journey.expect();
    await journey.depart();
    // A backup by the dead host of a vTPM that lived there before it came here.
    const lived = await Rescuer.create();
    await here.world.trust.addPeer(
      testPeer({ name: 'd', hostId: idOf(lived.world), backupKey: lived.world.keys.backupKey.publicKey }),
    );
    await lived.world.manufactured(mine);
    const old = await backedUp(lived.world, mine);
    await assert.rejects(here.rescue(here.request(old, lived, mine)), refused('in-doubt'));
    await here.world.registry.departures.commit(mine.id, await journey.commit());
    await assert.rejects(here.rescue(here.request(old, lived, mine)), refused('moved'));
  });

  it('is refused where it was on its way to a third host when the backup was made', async () => {
    const third = await Rescuer.create();
    const journey = new Journey(dead.world, third.world, worker, 'OFFLINE');
    await journey.expect();
    await journey.depart();
    const leaving = await backedUp(dead.world, vtpm);
    await assert.rejects(here.rescue(here.request(leaving, dead, vtpm)), refused('in-doubt'));
    const toHere = new Rescuer(third.world);
    await toHere.know(dead);
    await toHere.rescue(toHere.request(leaving, dead, vtpm));
  });

  it('brings back what went from here to the host that is dead', async () => {
    const mine = testVtpm();
    const other = await here.world.manufactured(mine);
    const journey = new Journey(here.world, dead.world, other, 'OFFLINE');
    await journey.expect();
    await journey.depart();
    await here.world.registry.departures.commit(mine.id, await journey.commit());
    const copy = await backedUp(dead.world, mine);
    await here.rescue(here.request(copy, dead, mine));
    const header = await here.header(mine);
    assert.deepEqual([header.kind, header.epoch], ['LIVE', EPOCHS]);
  });

  describe('when the host that was dead is back', () => {
    beforeEach(async () => {
      await dead.know(here);
      await here.rescue(here.request(backup, dead, vtpm));
      assert.equal(here.told, 1);
    });

    it('ends the vTPM there, worker and all, and no Load is granted any more', async () => {
      const notices = await held();
      assert.equal(notices.length, 1);
      const before = await dead.world.anchor.counter.read();
      const heard = await dead.control.take(idOf(here.world), notices);
      assert.deepEqual(
        heard.map((uuid) => Buffer.from(uuid)),
        [Buffer.from(vtpm.uuid)],
      );
      assert.equal(worker.link.ended?.code, 'fenced');
      assert.ok((await dead.world.anchor.counter.read()) > before);
      const header = await dead.header(vtpm);
      assert.equal(header.kind, 'MOVED');
      assert.deepEqual(Buffer.from(header.departure!.destination), idOf(here.world));
      assert.deepEqual(dead.verdicts, ['intended', 'done']);
      for (const expectedEpoch of [1n, 2n, EPOCHS - 1n, EPOCHS]) {
        const late = dead.world.worker(vtpm);
        await assert.rejects(late.load({ expectedEpoch, verbs: ['COLD'] }), refused('moved'));
      }
      await dead.world.restart();
      assert.equal((await new Rescuer(dead.world).header(vtpm)).kind, 'MOVED');
    });

    it('is said also after a crash', async () => {
      await here.world.restart();
      here = new Rescuer(here.world);
      assert.equal((await held()).length, 1);
    });

    it('is forgotten when it was heard, also while a worker runs it', async () => {
      const next = here.world.worker(vtpm);
      await next.load({ expectedEpoch: EPOCHS, verbs: ['COLD'] });
      await next.connect();
      // Another host does not say what this one has heard.
      await here.control.heard(randomBytes(32), vtpm.uuid);
      assert.equal((await held()).length, 1);
      await here.control.heard(idOf(dead.world), vtpm.uuid);
      assert.deepEqual(await held(), []);
      assert.deepEqual((await here.header(vtpm)).rescues, []);
      await next.save('P4');
      assert.deepEqual((await here.header(vtpm)).rescues, []);
    });

    it('stays known over saves and a migration until it was heard', async () => {
      const next = here.world.worker(vtpm);
      await next.load({ expectedEpoch: EPOCHS, verbs: ['COLD'] });
      await next.connect();
      await next.save('P4');
      assert.equal((await held()).length, 1);
      const third = await Rescuer.create();
      const journey = new Journey(here.world, third.world, next, 'OFFLINE');
      await journey.expect();
      await journey.depart();
      await here.world.registry.departures.commit(vtpm.id, await journey.commit());
      assert.equal((await held()).length, 1);
      const back = new Journey(third.world, here.world, next, 'OFFLINE');
      await back.expect();
      await back.depart();
      await third.world.registry.departures.commit(vtpm.id, await back.commit());
      assert.equal((await here.header(vtpm)).kind, 'LIVE');
      assert.equal((await held()).length, 1);
    });

    it('lets it come back by a migration', async () => {
      await dead.control.take(idOf(here.world), await held());
      const next = here.world.worker(vtpm);
      await next.load({ expectedEpoch: EPOCHS, verbs: ['COLD'] });
      await next.connect();
      await next.save('P4');
      const journey = new Journey(here.world, dead.world, next, 'OFFLINE');
      await journey.expect();
      await journey.depart();
      await here.world.registry.departures.commit(vtpm.id, await journey.commit());
      const header = await dead.header(vtpm);
      assert.deepEqual([header.kind, header.marks], ['LIVE', ['rescued']]);
      // The notice of before is of an earlier time.
      const [old] = await here.control.held(idOf(dead.world));
      assert.ok(old);
      assert.equal((await dead.control.take(idOf(here.world), [old])).length, 1);
      assert.equal((await dead.header(vtpm)).kind, 'LIVE');
    });

    it('does not end what no backup of that host is shown for, and says so in the log', async () => {
      const [notice] = await held();
      assert.ok(notice);
      const third = await Rescuer.create();
      assert.deepEqual(await dead.control.take(idOf(third.world), [notice]), []);
      assert.deepEqual(dead.verdicts, ['refused']);
      assert.equal((await dead.header(vtpm)).kind, 'LIVE');
      await worker.save('P5');
    });

    it('writes one line of many that are bad, and takes what is good among them', async () => {
      const [notice] = await held();
      assert.ok(notice);
      const bad = { notice: notice.notice, signature: randomBytes(64) };
      assert.deepEqual(await dead.control.take(idOf(here.world), [bad, bad, bad]), []);
      assert.equal((await dead.control.take(idOf(here.world), [bad, notice, bad])).length, 1);
      assert.deepEqual(dead.verdicts, ['refused', 'intended', 'done']);
      assert.equal((await dead.header(vtpm)).kind, 'MOVED');
    });

    it('ends nothing for a host to which vTPMs do not go, until they do', async () => {
      const may = (mayReceive: boolean) =>
        dead.world.trust.changePeer('host0', (peer) => ({ ...peer, mayReceive }));
      await may(false);
      assert.deepEqual(await dead.control.take(idOf(here.world), await held()), []);
      assert.equal((await dead.header(vtpm)).kind, 'LIVE');
      assert.deepEqual(
        dead.world.audited.flatMap(({ action, reason }) => (action === 'rescue' ? [reason?.code] : [])),
        ['peer-forbidden'],
      );
      await may(true);
      assert.equal((await dead.control.take(idOf(here.world), await held())).length, 1);
      assert.equal((await dead.header(vtpm)).kind, 'MOVED');
    });

    it('has not heard it where it had gone to a third host: two may run it, and the log names both', async () => {
      const third = await Rescuer.create();
      const journey = new Journey(dead.world, third.world, worker, 'OFFLINE');
      await journey.expect();
      await journey.depart();
      await dead.world.registry.departures.commit(vtpm.id, await journey.commit());
      assert.deepEqual(await dead.control.take(idOf(here.world), await held()), []);
      assert.deepEqual(await dead.control.take(idOf(here.world), await held()), []);
      const [entry, ...more] = dead.world.audited.filter(({ action }) => action === 'rescue');
      assert.deepEqual([entry?.verdict, entry?.reason?.code, more.length], ['refused', 'moved', 0]);
      const { rescuer, livesAt } = entry?.facts ?? {};
      assert.deepEqual(
        [rescuer, livesAt],
        [idOf(here.world).toString('hex'), idOf(third.world).toString('hex')],
      );
      assert.equal((await held()).length, 1);
    });

    it('waits while a migration of it is in doubt', async () => {
      const third = await Rescuer.create();
      const journey = new Journey(dead.world, third.world, worker, 'OFFLINE');
      await journey.expect();
      await journey.depart();
      assert.deepEqual(await dead.control.take(idOf(here.world), await held()), []);
      assert.equal((await dead.header(vtpm)).kind, 'LIVE');
      const late = dead.world.worker(vtpm);
      await assert.rejects(late.load({ expectedEpoch: 1n, verbs: ['COLD'] }), refused('migrating'));
    });

    it('knows nothing of what is not there', async () => {
      const stranger = testVtpm();
      const other = await dead.world.manufactured(stranger);
      const copy = await backedUp(dead.world, stranger);
      await here.rescue(here.request(copy, dead, stranger));
      other.stream?.detach();
      await dead.world.registry.retire(stranger.id, 'manager');
      assert.equal((await dead.control.take(idOf(here.world), await held())).length, 2);
      assert.equal((await dead.header(stranger)).kind, 'RETIRED');
    });
  });
});

describe('a vTPM that is taken back from a destination that is gone', () => {
  let gone: Rescuer;
  let here: Rescuer;
  let worker: Worker;
  let way: Journey;

  beforeEach(async () => {
    [gone, here] = [await Rescuer.create(), await Rescuer.create()];
    await here.know(gone);
    await gone.know(here);
    worker = await here.world.manufactured();
    way = new Journey(here.world, gone.world, worker, 'OFFLINE');
  });

  const pending = async () => {
    const [first] = await here.world.registry.departures.pending();
    assert.ok(first);
    return first;
  };
  const takeBack = async (of = pending()) =>
    await here.control.takeBack({ uid: 0 }, await of, here.fencing(gone, worker.vtpm));
  const told = async () =>
    await gone.control.take(idOf(here.world), await here.control.held(idOf(gone.world)));

  it('is marked, at an epoch and a generation that nobody has had, and the TPM has counted it', async () => {
    await way.expect();
    await way.depart();
    await way.commit();
    const before = await copyOfDisk(here.world);
    await takeBack();
    assert.equal(await before.isNewest(), false);
    const header = await here.header(worker.vtpm);
    assert.deepEqual([header.kind, header.marks, header.departure], ['LIVE', ['rescued'], undefined]);
    assert.equal(header.epoch, EPOCHS);
    assert.ok(header.generation > 9n && header.generation % EPOCHS === 1n);
    assert.equal(here.told, 1);
    await here.world.restart();
    here = new Rescuer(here.world);
    assert.equal((await told()).length, 1);
    assert.equal((await gone.header(worker.vtpm)).kind, 'MOVED');
    await assert.rejects(new Journey(gone.world, here.world, worker, 'OFFLINE').depart(), refused('moved'));
  });

  it('is ended there only where it came by that departure, and that is not settled', async () => {
    await way.expect();
    await way.depart();
    await way.commit();
    await takeBack();
    await gone.world.registry.arrivals.settled(way.migrationId, idOf(here.world));
    assert.deepEqual(await told(), []);
    assert.deepEqual(gone.verdicts, ['refused']);
    assert.equal((await gone.header(worker.vtpm)).kind, 'LIVE');
  });

  it('does not come there any more where it is expected still', async () => {
    await way.expect();
    await way.depart();
    await takeBack();
    assert.equal((await told()).length, 1);
    await assert.rejects(way.commit(), refused('migration-aborted'));
    assert.equal(await gone.world.registry.record(worker.vtpm.id), undefined);
  });

  it('is not what that host sent on to a third one at another time', async () => {
    const third = await Rescuer.create();
    await way.expect();
    await way.depart();
    await here.world.registry.departures.commit(worker.vtpm.id, await way.commit());
    const move = async (from: Rescuer, to: Rescuer) => {
      const next = new Journey(from.world, to.world, worker, 'OFFLINE');
      await next.expect();
      await next.depart();
      await from.world.registry.departures.commit(worker.vtpm.id, await next.commit());
    };
    await move(gone, third);
    await move(third, here);
    way = new Journey(here.world, gone.world, worker, 'OFFLINE');
    await way.expect();
    await way.depart();
    await takeBack();
    assert.equal((await told()).length, 1);
    assert.deepEqual(gone.verdicts, []);
  });

  it('has not heard it where it went on to a third host from there: two may run it, and the log names both', async () => {
    const third = await Rescuer.create();
    await way.expect();
    await way.depart();
    await way.commit();
    const on = new Journey(gone.world, third.world, worker, 'OFFLINE');
    await on.expect();
    await on.depart();
    await gone.world.registry.departures.commit(worker.vtpm.id, await on.commit());
    await takeBack();
    assert.deepEqual(await told(), []);
    assert.deepEqual(gone.verdicts, ['refused']);
  });

  it('is told to each host that it was taken back from', async () => {
    await way.expect();
    await way.depart();
    await way.commit();
    await takeBack();
    const third = await Rescuer.create();
    await here.world.trust.addPeer(testPeer({ name: 'third', hostId: idOf(third.world) }));
    await third.know(here);
    const on = new Journey(here.world, third.world, worker, 'OFFLINE');
    await on.expect();
    await on.depart();
    await on.commit();
    const away = await pending();
    const statement = here.fencing(third, worker.vtpm, { lastGeneration: away.generation });
    await here.control.takeBack({ uid: 0 }, away, statement);
    assert.equal((await told()).length, 1);
    assert.equal((await gone.header(worker.vtpm)).kind, 'MOVED');
    const notices = await here.control.held(idOf(third.world));
    assert.equal((await third.control.take(idOf(here.world), notices)).length, 1);
    assert.equal((await third.header(worker.vtpm)).kind, 'MOVED');
    await here.control.heard(idOf(gone.world), worker.vtpm.uuid);
    assert.deepEqual(await here.control.held(idOf(gone.world)), []);
    assert.equal((await here.control.held(idOf(third.world))).length, 1);
  });

  it('is not said to have gone there to a source with an old disk', async () => {
    await way.expect();
    await way.depart();
    await way.commit();
    const old = await pending();
    await takeBack();
    assert.equal((await told()).length, 1);
    const { vtpm } = worker;
    const inquiry = { ...old.departure, vtpmUuid: vtpm.uuid, source: idOf(here.world) };
    await assert.rejects(gone.world.registry.arrivals.abort(inquiry), refused('in-doubt'));
    assert.equal(await gone.world.registry.arrivals.decisionOf(way.migrationId), undefined);
  });

  it('is not heard by a host that may have it in a newer store than the one that was accepted there', async () => {
    await way.expect();
    await way.depart();
    await gone.world.store.write(ACCEPTANCE_KEY, 0, acceptanceRecord(Date.now()));
    await takeBack();
    assert.deepEqual(await told(), []);
    assert.equal((await here.control.held(idOf(gone.world))).length, 1);
  });

  it('goes on, and is ended there, though the log is full before it says that it is done', async () => {
    await way.expect();
    await way.depart();
    await way.commit();
    for (const { world } of [here, gone]) {
      world.beforeAudit = ({ verdict }) => {
        if (verdict === 'done') throw new ManagerError('store-full', 'the log is full');
      };
    }
    await takeBack();
    assert.equal(here.told, 1);
    assert.ok(here.world.events.some(({ type }) => type === 'stayed'));
    assert.equal((await told()).length, 1);
    assert.ok(gone.world.events.some(({ type }) => type === 'moved'));
    assert.equal((await gone.header(worker.vtpm)).kind, 'MOVED');
  });

  it('is on its way no more where its destination has said what it decided: unknown-migration', async () => {
    await way.expect();
    await way.depart();
    const before = await pending();
    await here.world.registry.departures.abort(worker.vtpm.id, await way.ask());
    await assert.rejects(takeBack(Promise.resolve(before)), refused('unknown-migration'));
    // Nor is a later attempt that one.
    way = new Journey(here.world, gone.world, worker, 'OFFLINE');
    await way.expect();
    await way.depart();
    await assert.rejects(takeBack(Promise.resolve(before)), refused('unknown-migration'));
    assert.deepEqual((await here.header(worker.vtpm)).marks, []);
  });

  it('needs a peer that can be told when it is back: unknown-peer', async () => {
    await way.expect();
    await way.depart();
    await here.world.trust.removePeer('host0');
    await assert.rejects(takeBack(), refused('unknown-peer'));
  });
});
