import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { monotonicMs } from 'vtpm-common';
import type { ManagerErrorCode } from 'vtpm-manager';
import { deriveRootKeys } from 'vtpm-manager/keys/index';
import { decodeRecord } from 'vtpm-manager/records/index';
import {
  decode,
  openBox,
  sealBox,
  signDelegation,
  signingKeyFromSeed,
  signTicket,
  type Ticket,
  ticketDigest,
  type WorkerFrame,
} from 'vtpm-proto';
import { storeFull } from '../support/memory-store.js';
import {
  loadRequest,
  saveBytes,
  sha256,
  TestToolstack,
  type TestVtpm,
  testVtpm,
} from '../support/worker-client.js';

import { RecordedLink, refused, type Worker, World } from './ownership-fixture.js';

describe('Load', () => {
  let world: World;
  beforeEach(async () => {
    world = await World.create();
  });

  it('manufactures once, then gives back what was saved', async () => {
    const worker = world.worker();
    const first = await worker.load();
    assert.equal(first.manufacture, true);
    assert.equal(first.epoch, 1n);
    assert.equal(first.generation, 0n);
    assert.equal(first.permanent.length, 0);
    await worker.connect();
    assert.equal((await worker.save('P1')).generation, 1n);
    const second = await world.worker(worker.vtpm).load({ expectedEpoch: 1n, verbs: ['COLD'] });
    assert.equal(second.manufacture, false);
    assert.equal(second.epoch, 2n);
    assert.equal(second.generation, 1n);
    assert.equal(Buffer.from(second.permanent).toString(), 'P1');
  });

  it('manufactures again while nothing was saved', async () => {
    const worker = world.worker();
    await worker.load();
    const again = await world.worker(worker.vtpm).load({ expectedEpoch: 1n });
    assert.equal(again.manufacture, true);
    assert.equal(again.epoch, 2n);
  });

  const refusals: [string, ManagerErrorCode, Partial<Ticket>][] = [
    ['a ticket for another manager', 'wrong-manager', { managerId: randomBytes(32) }],
    ['a ticket of another boot', 'ticket-expired', { bootId: randomBytes(16) }],
    [
      'a ticket past its time and the skew',
      'ticket-expired',
      { expiresAtMonotonicMs: monotonicMs() - 61_000n },
    ],
    ['an image that is not allowed', 'image-not-allowed', { imageDigest: randomBytes(32) }],
    ['a first Load without manufacture', 'verb-missing', { verbs: ['COLD', 'RESUME'] }],
    ['an epoch that never was', 'stale-epoch', { expectedEpoch: 1n }],
    ['a newer ticket format', 'newer-format', { format: 2 }],
    ['a malformed ticket', 'bad-request', { vmRunId: randomBytes(15) }],
  ];
  for (const [what, code, changes] of refusals) {
    it(`refuses ${what}: ${code}`, async () => {
      const worker = world.worker();
      await assert.rejects(worker.load(changes), refused(code));
      // The same worker with a good ticket: the refusal took nothing.
      assert.equal((await worker.load()).epoch, 1n);
    });
  }

  it('takes a ticket within the skew', async () => {
    await world.worker().load({ expiresAtMonotonicMs: world.now - 59_000n });
  });

  it('refuses a ticket whose signatures do not hold: ticket-forged', async () => {
    const worker = world.worker();
    const good = worker.ticket();
    const stranger = signingKeyFromSeed(randomBytes(32));
    const fields = decode('Ticket', good.ticket);
    const delegation = decode('Delegation', good.delegation);
    const forgeries = [
      { ...good, signature: randomBytes(64) },
      { ...good, delegationSignature: randomBytes(64) },
      // Signed by a key that was not delegated.
      signTicket(stranger, fields, { delegation: good.delegation, signature: good.delegationSignature }),
      // A delegation for another vTPM.
      signTicket(
        world.toolstack.delegateKey,
        fields,
        signDelegation(world.toolstack.key, { ...delegation, vtpmUuid: randomBytes(16) }),
      ),
      // A verb that was not delegated.
      signTicket(
        world.toolstack.delegateKey,
        fields,
        signDelegation(world.toolstack.key, { ...delegation, verbs: ['COLD'] }),
      ),
    ];
    for (const ticket of forgeries) {
      const request = loadRequest(world.managerId, ticket, worker.keys);
      await assert.rejects(world.registry.load(request, worker.connection), refused('ticket-forged'));
    }
    await world.registry.load(loadRequest(world.managerId, good, worker.keys), worker.connection);
  });

  it('refuses a toolstack it does not know: unknown-toolstack-key', async () => {
    const worker = world.worker();
    const stranger = new TestToolstack();
    const ticket = stranger.ticket(world.managerId, worker.vtpm, worker.keys.publicKey, {
      imageDigest: world.toolstack.imageDigest,
    });
    const request = loadRequest(world.managerId, ticket, worker.keys);
    await assert.rejects(world.registry.load(request, worker.connection), refused('unknown-toolstack-key'));
  });

  it('refuses a Load without ticket, and a box that is none: bad-request', async () => {
    const worker = world.worker();
    const request = loadRequest(world.managerId, worker.ticket(), worker.keys);
    const { ticket: _none, ...without } = request;
    await assert.rejects(world.registry.load(without, worker.connection), refused('bad-request'));
    await assert.rejects(
      world.registry.load({ ...request, nonce: randomBytes(23) }, worker.connection),
      refused('bad-request'),
    );
  });

  it('refuses a vTPM that belongs to another VM: wrong-vm', async () => {
    const worker = await world.manufactured();
    const otherVm: TestVtpm = { ...worker.vtpm, vmUuid: randomBytes(16) };
    await assert.rejects(
      world.worker(otherVm).load({ expectedEpoch: 1n, verbs: ['COLD'] }),
      refused('wrong-vm'),
    );
    await world.worker(worker.vtpm).load({ expectedEpoch: 1n, verbs: ['COLD'] });
  });

  it('refuses to manufacture what has state: already-manufactured', async () => {
    const worker = await world.manufactured();
    const next = world.worker(worker.vtpm);
    await assert.rejects(next.load({ expectedEpoch: 1n }), refused('already-manufactured'));
    await assert.rejects(next.load({ expectedEpoch: 1n, verbs: ['EXPORT'] }), refused('verb-missing'));
    const grant = await next.load({ expectedEpoch: 1n, verbs: ['MANUFACTURE', 'COLD'] });
    assert.equal(grant.manufacture, false);
  });

  it('takes a ticket once: stale-epoch', async () => {
    const worker = world.worker();
    const request = loadRequest(world.managerId, worker.ticket(), worker.keys);
    await world.registry.load(request, {});
    await assert.rejects(world.registry.load(request, {}), refused('stale-epoch'));
    await world.restart();
    await assert.rejects(world.registry.load(request, {}), refused('stale-epoch'));
  });

  it('refuses what was retired: retired', async () => {
    const worker = await world.manufactured();
    worker.stream!.detach();
    await world.registry.retire(worker.vtpm.id, 'manager');
    await assert.rejects(
      world.worker(worker.vtpm).load({ expectedEpoch: 1n, verbs: ['COLD'] }),
      refused('retired'),
    );
    await assert.rejects(world.worker(worker.vtpm).load(), refused('retired'));
  });

  it('lets one of two at the same time through, the other hears who holds it: busy', async () => {
    const vtpm = testVtpm();
    const [a, b] = [world.worker(vtpm), world.worker(vtpm)];
    const results = await Promise.allSettled([a.load(), b.load()]);
    assert.equal(results.filter(({ status }) => status === 'fulfilled').length, 1);
    const [loser] = results.filter((result) => result.status === 'rejected');
    assert.ok(refused('busy')(loser!.reason));
    assert.match((loser!.reason as Error).message, /a load has been running for \d+ ms/);
  });

  it('whose commit fails takes nothing and leaves the vTPM free', async () => {
    const worker = world.worker();
    world.disk.beforeCommit = storeFull;
    await assert.rejects(worker.load(), refused('store-full'));
    world.disk.beforeCommit = () => undefined;
    assert.equal((await worker.load()).epoch, 1n);
  });

  it('gives one session per connection', async () => {
    const worker = world.worker();
    await worker.load();
    const other = world.worker();
    const request = loadRequest(world.managerId, other.ticket(), other.keys);
    await assert.rejects(world.registry.load(request, worker.connection), refused('bad-request'));
    await world.registry.load(request, {});
  });
});

describe('I-2 no worker loads, saves or learns anything of a vTPM that is not on its ticket', () => {
  let world: World;
  beforeEach(async () => {
    world = await World.create();
  });

  it('a foreign ticket is no use to a worker with another key', async () => {
    const [owner, thief] = [world.worker(), world.worker()];
    const ticket = owner.ticket();
    await assert.rejects(
      world.registry.load(loadRequest(world.managerId, ticket, thief.keys), {}),
      refused('wrong-worker'),
    );
    // Positive control: the same bytes from the owner work, and only the owner can read the answer.
    const answer = await world.registry.load(loadRequest(world.managerId, ticket, owner.keys), {});
    assert.throws(() => openBox('LoadGrant', answer, world.managerId, thief.keys));
    openBox('LoadGrant', answer, world.managerId, owner.keys);
  });

  it('a claim made for one ticket does not go with another', async () => {
    const worker = world.worker();
    const [a, b] = [worker.ticket(), worker.ticket({ vmRunId: randomBytes(16) })];
    const claim = { ticketDigest: ticketDigest(a), loadId: randomBytes(16), libtpmsVersion: '0.9.2' };
    const box = sealBox('LoadClaim', claim, world.managerId, worker.keys);
    await assert.rejects(world.registry.load({ ticket: b, ...box }, {}), refused('wrong-worker'));
    await world.registry.load({ ticket: a, ...box }, {});
  });

  it("another vTPM's session does not open with one's own key", async () => {
    const [own, other] = [await world.manufactured(), await world.manufactured()];
    const frame: WorkerFrame = {
      ...own.session!.firstFrame({ link: 9n }),
      vtpmUuid: other.vtpm.uuid,
      sessionId: other.session!.grant.sessionId,
    };
    await assert.rejects(world.registry.attach(frame, new RecordedLink(), {}), refused('wrong-worker'));
    await assert.rejects(
      world.registry.attach(frame, new RecordedLink(), own.connection),
      refused('wrong-worker'),
    );
    // A session that is not there looks like one that is over, whether or not the vTPM exists.
    for (const vtpmUuid of [other.vtpm.uuid, randomBytes(16)]) {
      const guess = { ...frame, vtpmUuid, sessionId: randomBytes(16) };
      await assert.rejects(world.registry.attach(guess, new RecordedLink(), {}), refused('fenced'));
    }
    assert.equal((await other.save('P2')).generation, 2n);
  });

  it("a save of another session does not enter one's stream", async () => {
    const [own, other] = [await world.manufactured(), await world.manufactured()];
    const foreign = other.session!.saveFrame(2n, { permanent: Buffer.from('foreign') });
    await assert.rejects(own.stream!.receive(foreign), refused('bad-request'));
    assert.equal((await own.save('P2')).generation, 2n);
  });

  it('a recorded first frame does not open the session again, not even after a restart', async () => {
    const worker = world.worker();
    await worker.load();
    const hello = worker.session!.firstFrame();
    await world.registry.attach(hello, new RecordedLink(), worker.connection);
    await assert.rejects(world.registry.attach(hello, new RecordedLink(), {}), refused('wrong-worker'));
    await worker.connect({});
    await worker.save('P1');
    await world.restart();
    await assert.rejects(world.registry.attach(hello, new RecordedLink(), {}), refused('wrong-worker'));
    await worker.connect({});
  });

  it('a frame with its number changed does not open', async () => {
    const worker = await world.manufactured();
    const frame = worker.session!.saveFrame(2n, { permanent: Buffer.from('P2') });
    await assert.rejects(worker.stream!.receive({ ...frame, sequence: 3n }), refused('bad-request'));
    await worker.stream!.receive(frame);
  });
});

describe('Save', () => {
  let world: World;
  let worker: Worker;
  beforeEach(async () => {
    world = await World.create();
    worker = await world.manufactured();
  });

  it('is acknowledged with generation, digest and sequence, when it is durable', async () => {
    let release: () => void = () => undefined;
    const gate = new Promise<void>((resolve) => {
      release = resolve;
    });
    world.disk.beforeCommit = () => gate;
    const before = worker.link.frames.length;
    const saving = worker.save('P2');
    await new Promise((resolve) => setImmediate(resolve));
    assert.equal(worker.link.frames.length, before);
    release();
    const ack = await saving;
    assert.equal(ack.generation, 2n);
    assert.equal(ack.committed, 2n);
    assert.deepEqual(Buffer.from(ack.digest), sha256(saveBytes({ permanent: Buffer.from('P2') })));
  });

  it('sent again is acknowledged again and counts once', async () => {
    await worker.save('P2');
    const again = await worker.save('P2', 2n);
    assert.equal(again.generation, 2n);
    assert.equal(again.committed, 2n);
  });

  it('with a used sequence and other content ends the session: fenced', async () => {
    await worker.save('P2');
    await assert.rejects(worker.save('other', 2n), refused('fenced'));
    await expectFenced(world, worker);
  });

  it('older than the last one ends the session: fenced', async () => {
    await worker.save('P2');
    await assert.rejects(worker.save('P1', 1n), refused('fenced'));
    await expectFenced(world, worker);
  });

  it('that leaves one out is refused, the session goes on', async () => {
    await assert.rejects(worker.save('P3', 3n), refused('bad-request'));
    assert.equal((await worker.save('P2', 2n)).generation, 2n);
  });

  it('has limits: too-large', async () => {
    const session = worker.session!;
    const save = (body: object) => worker.stream!.receive(session.saveFrame(2n, body));
    await assert.rejects(save({ permanent: Buffer.alloc(256 * 1024 + 1) }), refused('too-large'));
    const use = { action: 'SUSPEND', digest: Buffer.alloc(32) };
    const large = { permanent: Buffer.from('P'), volatile: Buffer.alloc(64 * 1024 + 1), use };
    await assert.rejects(save(large), refused('too-large'));
    await assert.rejects(save({ permanent: Buffer.alloc(0) }), refused('bad-request'));
    await save({ permanent: Buffer.alloc(256 * 1024), volatile: Buffer.alloc(64 * 1024), use });
  });

  it('without permanent part is not the first', async () => {
    const fresh = world.worker();
    await fresh.load();
    await fresh.connect();
    const frame = fresh.session!.saveFrame(1n, {});
    await assert.rejects(fresh.stream!.receive(frame), refused('bad-request'));
  });

  it('whose outcome is not known ends the link; the session resumes with what is on the disk', async () => {
    world.disk.beforeCommit = storeFull;
    await assert.rejects(worker.save('P2', 2n), refused('store-full'));
    world.disk.beforeCommit = () => undefined;
    await assert.rejects(worker.save('P2', 2n), refused('fenced'));
    worker.stream!.detach();
    assert.equal((await worker.connect({})).committed, 1n);
    assert.equal((await worker.save('P2', 2n)).generation, 2n);
  });

  it('of a worker that lost the vTPM is fenced', async () => {
    const link = worker.link;
    const next = world.worker(worker.vtpm);
    await next.load({ expectedEpoch: 1n, verbs: ['COLD'] });
    const frame = link.frames.at(-1)!;
    assert.equal(frame.type, 'FENCED');
    assert.equal(decode('Fenced', worker.session!.cipher.openManager(frame)).reason, 'fenced');
    assert.equal(link.ended?.code, 'fenced');
    await assert.rejects(worker.save('late'), refused('fenced'));
    await assert.rejects(worker.connect({}), refused('fenced'));
    await next.connect();
    await next.save('P2');
    assert.equal((await world.registry.view(worker.vtpm.id)).header.generation, 2n);
  });
});

describe('sessions over links and restarts', () => {
  let world: World;
  let worker: Worker;
  beforeEach(async () => {
    world = await World.create();
    worker = await world.manufactured();
  });

  it('go on with a manager that was killed', async () => {
    await worker.save('P2');
    await world.restart();
    const ack = await worker.connect({});
    assert.equal(ack.committed, 2n);
    assert.equal(ack.generation, 2n);
    assert.deepEqual(Buffer.from(ack.digest), sha256(saveBytes({ permanent: Buffer.from('P2') })));
    assert.equal((await worker.save('P3')).generation, 3n);
  });

  it('acknowledge again the save whose acknowledgement was lost', async () => {
    await worker.save('P2');
    await world.restart();
    worker.link.frames.length = 0;
    await worker.connect({});
    const again = await worker.save('P2', 2n);
    assert.equal(again.generation, 2n);
  });

  it('take the newest link, the older one ends', async () => {
    const old = worker.link;
    const oldStream = worker.stream!;
    await worker.connect({});
    assert.equal(old.ended?.code, 'busy');
    oldStream.detach();
    assert.equal((await world.registry.view(worker.vtpm.id)).isConnected, true);
    assert.equal((await worker.save('P2')).generation, 2n);
  });

  it('notice a store that is older than an acknowledgement: rollback-detected', async () => {
    worker.session!.sequence = 5n;
    const frame = worker.session!.firstFrame();
    await assert.rejects(world.registry.attach(frame, new RecordedLink(), {}), refused('rollback-detected'));
  });

  it('are told to freeze and to thaw, and answer', async () => {
    const frozen = world.registry.departures.suspend(worker.vtpm.id);
    const freeze = worker.link.frames.at(-1)!;
    assert.equal(freeze.type, 'FREEZE');
    worker.session!.cipher.openManager(freeze);
    await worker.stream!.receive(
      worker.session!.cipher.sealWorker('FROZEN', freeze.sequence, new Uint8Array(0)),
    );
    assert.equal(await frozen, 'frozen');
    await world.registry.departures.thawWorker(worker.vtpm.id);
    const thaw = worker.link.frames.at(-1)!;
    assert.equal(thaw.type, 'THAW');
    assert.notEqual(thaw.sequence, freeze.sequence);
  });

  it('tell the event stream what happens', async () => {
    worker.stream!.detach();
    await world.registry.retire(worker.vtpm.id, 'manager');
    assert.deepEqual(
      world.events.map((event) => `${event.type} ${'generation' in event && event.generation}`),
      ['loaded 0', 'link-up 0', 'saved 1', 'link-lost 1', 'retired 1'],
    );
  });
});

describe('retire', () => {
  it('needs the worker gone and the vTPM known', async () => {
    const world = await World.create();
    const worker = await world.manufactured();
    await assert.rejects(world.registry.retire(worker.vtpm.id, 'manager'), refused('busy'));
    await assert.rejects(world.registry.retire(testVtpm().id, 'manager'), refused('unknown-vtpm'));
    worker.stream!.detach();
    await world.registry.retire(worker.vtpm.id, 'manager');
    await world.registry.retire(worker.vtpm.id, 'manager');
    await assert.rejects(worker.connect({}), refused('fenced'));
  });
});

async function expectFenced(world: World, worker: Worker): Promise<void> {
  assert.equal(worker.link.frames.at(-1)!.type, 'FENCED');
  assert.equal(worker.link.ended?.code, 'fenced');
  await assert.rejects(worker.connect({}), refused('fenced'));
  await world.restart();
  await assert.rejects(worker.connect({}), refused('fenced'));
  // The state of the last good save is what the next worker gets.
  const grant = await world.worker(worker.vtpm).load({ expectedEpoch: 1n, verbs: ['COLD'] });
  assert.equal(Buffer.from(grant.permanent).toString(), 'P2');
}

describe('a rekey', () => {
  let world: World;
  let worker: Worker;
  beforeEach(async () => {
    world = await World.create();
    worker = await world.manufactured();
    world.keys.advance(deriveRootKeys(randomBytes(32), world.keys.storeId, 2));
  });

  const keyIdOf = async ({ vtpm }: Worker) => {
    const entry = await world.store.read(`vtpm/${vtpm.id}`);
    return decodeRecord(world.keys, vtpm.uuid, entry!.value).header.keyId;
  };

  it('goes between two saves, which do not notice', async () => {
    await world.registry.rekey(worker.vtpm.id);
    assert.equal(await keyIdOf(worker), 2);
    assert.equal((await worker.save('P2')).generation, 2n);
    world.keys.forgetOlder();
    const next = await world.worker(worker.vtpm).load({ expectedEpoch: 1n, verbs: ['COLD'] });
    assert.equal(Buffer.from(next.permanent).toString(), 'P2');
  });

  it('goes between a Load and the stream of its session, which begins with what is there then', async () => {
    const next = world.worker(worker.vtpm);
    await next.load({ expectedEpoch: 1n, verbs: ['COLD'] });
    await world.registry.rekey(worker.vtpm.id);
    await next.connect();
    assert.equal((await next.save('P2')).generation, 2n);
    assert.equal(await keyIdOf(worker), 2);
  });

  it('takes the record of a session whose link is about to end, too', async () => {
    world.disk.beforeCommit = storeFull;
    await assert.rejects(worker.save('P2'), refused('store-full'));
    world.disk.beforeCommit = () => undefined;
    await world.registry.rekey(worker.vtpm.id);
    assert.equal(await keyIdOf(worker), 2);
  });

  it('that fails ends the link and not the session', async () => {
    world.disk.beforeCommit = storeFull;
    await assert.rejects(world.registry.rekey(worker.vtpm.id), refused('store-full'));
    world.disk.beforeCommit = () => undefined;
    assert.equal(worker.link.ended?.code, 'store-full');
    worker.stream!.detach();
    assert.equal((await worker.connect({})).committed, 1n);
    assert.equal((await worker.save('P2', 2n)).generation, 2n);
    await world.registry.rekey(worker.vtpm.id);
    assert.equal(await keyIdOf(worker), 2);
  });

  it('waits for the Loads that were under way', async () => {
    let commit: () => void = () => undefined;
    const held = new Promise<void>((resolve) => {
      commit = resolve;
    });
    world.disk.beforeCommit = () => held;
    const loading = world.worker().load();
    await new Promise((resolve) => setImmediate(resolve));
    let isSettled = false;
    const settled = world.registry.settled().then(() => {
      isSettled = true;
    });
    await new Promise((resolve) => setImmediate(resolve));
    assert.equal(isSettled, false);
    commit();
    await loading;
    await settled;
    assert.equal(world.registry.census.live, 2);
  });
});
