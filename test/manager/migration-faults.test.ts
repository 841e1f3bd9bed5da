import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import fc from 'fast-check';
import { ManagerError } from 'vtpm-manager';
import { STRANGE_INQUIRIES } from 'vtpm-manager/migration/limits';
import { Talk } from 'vtpm-manager/migration/talk';
import { tellRescues } from 'vtpm-manager/rescue/exchange';
import { signFencing, signMigrateOrder } from 'vtpm-proto';
import type { MemoryCounter } from '../support/memory-counter.js';
import { type Fate, ModelHost, ModelNet } from '../support/model-net.js';
import { until } from '../support/until.js';
import type { TestVtpm } from '../support/worker-client.js';
import { refused, World } from './ownership-fixture.js';

/** Two hosts whose records are real, and lines between them that are not to be relied on. */
class TwoHosts {
  readonly net = new ModelNet();
  a!: ModelHost;
  b!: ModelHost;

  static async create(): Promise<TwoHosts> {
    const hosts = new TwoHosts();
    hosts.a = new ModelHost('a', await World.create(), hosts.net);
    hosts.b = new ModelHost('b', await World.create(), hosts.net);
    hosts.a.knows(hosts.b);
    hosts.b.knows(hosts.a);
    await hosts.a.begin();
    await hosts.b.begin();
    return hosts;
  }

  async stopped(host: ModelHost, permanent: string): Promise<TestVtpm> {
    const worker = await host.world.manufactured();
    await worker.save(permanent);
    worker.stream?.detach();
    return worker.vtpm;
  }

  /** From a to b; `net.letGo` delivers that message of it, counted from 1, and what comes after. */
  async moveHeldAt(message: number, vtpm: TestVtpm) {
    this.net.fates = [...Array<Fate>(message - 1).fill('deliver'), 'hold'];
    return await this.move(this.a, this.b, vtpm);
  }

  async close(): Promise<void> {
    await this.a.control.close();
    await this.b.control.close();
  }

  async move(from: ModelHost, to: ModelHost, vtpm: TestVtpm) {
    const { world } = from;
    const { header } = await world.registry.view(vtpm.id);
    const { key } = world.toolstack;
    const order = signMigrateOrder(key, {
      format: 1,
      managerId: world.managerId,
      toolstackKey: key.publicKey,
      vtpmUuid: vtpm.uuid,
      vmUuid: vtpm.vmUuid,
      destination: to.world.keys.hostKey.publicKey,
      expectedEpoch: header.epoch,
      leastGeneration: header.generation,
      migrationId: randomBytes(16),
      bootId: world.boot,
      expiresAtMonotonicMs: world.now + 60_000n,
      mode: 'OFFLINE',
      dryRun: false,
      description: Buffer.from('{}'),
    });
    const orderer = { progress: () => undefined, reaped: Promise.resolve() };
    return await from.control.migrate(order, orderer, new AbortController());
  }

  /** `b` has committed it, and none of its messages gets through. */
  async doubtful() {
    const { a, b, net } = this;
    const vtpm = await this.stopped(a, 'saved');
    // The eighth message is DECISION.
    net.fates = Array<Fate>(7).fill('deliver');
    net.further = 'cut-before';
    const moving = this.move(a, b, vtpm);
    await until('it is committed', () => b.world.registry.arrivals.unsettled().length === 1);
    const [doubt] = await a.world.registry.departures.pending();
    assert.ok(doubt);
    return { vtpm, moving, ...this.fenced(vtpm, doubt.departure.migrationId) };
  }

  /** What the operator says of `b`. */
  fenced(vtpm: TestVtpm, migrationId: Uint8Array) {
    const { a, b } = this;
    const { key } = a.world.toolstack;
    const fencing = signFencing(key, {
      format: 1,
      toolstackKey: key.publicKey,
      vtpmUuid: vtpm.uuid,
      host: b.world.keys.hostKey.publicKey,
      lastGeneration: 2n,
      method: 'its power was cut',
      at: BigInt(Date.now()),
    });
    const migration = Buffer.from(migrationId).toString('hex');
    /** On the word that `b` is gone for good. */
    const resolve = () => a.control.resolve(migration, 'manager', fencing);
    return { migrationId, resolve };
  }

  /** The manager of a host ends without a word and starts again from its disk. */
  async restart(host: ModelHost): Promise<void> {
    host.isUp = false;
    await host.control.close();
    await host.world.restart();
    host.isUp = true;
    await host.begin();
  }

  /** Until nothing is in doubt any more. */
  async settle(host: ModelHost): Promise<void> {
    for (const { departure } of await host.world.registry.departures.pending()) {
      await host.control
        .resolve(Buffer.from(departure.migrationId).toString('hex'), 'manager')
        .catch(() => undefined);
    }
    assert.deepEqual(await host.world.registry.departures.pending(), []);
  }

  /** Who lets it be loaded at its newest epoch, and what comes out there. */
  async livesAt(vtpm: TestVtpm): Promise<{ host: ModelHost; permanent: string; generation: bigint }[]> {
    const found = [];
    for (const host of [this.a, this.b]) {
      const record = await host.world.registry.record(vtpm.id);
      if (!record) continue;
      const worker = host.world.worker(vtpm);
      const loading = worker.load({ verbs: ['COLD'], expectedEpoch: record.header.epoch });
      const grant = await loading.catch(() => undefined);
      if (!grant) continue;
      const permanent = Buffer.from(grant.permanent).toString();
      found.push({ host, permanent, generation: grant.generation });
    }
    return found;
  }
}

const fate = fc.oneof(
  { weight: 6, arbitrary: fc.constant<Fate>('deliver') },
  { weight: 1, arbitrary: fc.constantFrom<Fate>('lose', 'double', 'swap', 'cut-before', 'cut-after') },
);

describe('the two ends of a migration, over lines that lose, double, reorder and cut', () => {
  it('I-3 leave one live copy with all that was saved, whatever becomes of the messages', async () => {
    await fc.assert(
      fc.asyncProperty(fc.array(fate, { minLength: 1, maxLength: 24 }), async (fates) => {
        const hosts = await TwoHosts.create();
        const vtpm = await hosts.stopped(hosts.a, 'saved');
        hosts.net.fates = [...fates];
        const end = await hosts.move(hosts.a, hosts.b, vtpm);
        hosts.net.fates = [];
        await hosts.settle(hosts.a);
        const lives = await hosts.livesAt(vtpm);
        assert.equal(lives.length, 1, end.at);
        assert.equal(lives[0]?.permanent, 'saved');
        assert.ok(lives[0].generation >= 2n);
        if (end.at === 'committed') assert.equal(lives[0].host.name, 'b');
        if (end.at === 'aborted') assert.equal(lives[0].host.name, 'a');
        await hosts.close();
      }),
      { numRuns: 40 },
    );
  });

  it('I-3 leave one live copy where every single message is lost, doubled, late or the last', async () => {
    // HELLO, OFFER, EVIDENCE, EVIDENCE, SECRET, READY, STATE, DECISION, SETTLED.
    for (const bad of ['lose', 'double', 'swap', 'cut-before', 'cut-after'] as const) {
      for (let at = 0; at < 9; at++) {
        const hosts = await TwoHosts.create();
        const vtpm = await hosts.stopped(hosts.a, 'saved');
        hosts.net.fates = [...Array<Fate>(at).fill('deliver'), bad];
        const end = await hosts.move(hosts.a, hosts.b, vtpm);
        await hosts.settle(hosts.a);
        const lives = await hosts.livesAt(vtpm);
        assert.equal(lives.length, 1, `${bad} ${at}: ${end.at}`);
        assert.equal(lives[0]?.permanent, 'saved');
        await hosts.close();
      }
    }
  });

  it('I-3 leave one live copy after restarts of either manager while it is in doubt', async () => {
    await fc.assert(
      fc.asyncProperty(
        fc.integer({ min: 0, max: 8 }),
        fc.constantFrom<Fate>('lose', 'cut-after'),
        fc.array(fc.constantFrom('a', 'b'), { minLength: 1, maxLength: 3 }),
        async (at, bad, restarts) => {
          const hosts = await TwoHosts.create();
          const vtpm = await hosts.stopped(hosts.a, 'saved');
          hosts.net.fates = [...Array<Fate>(at).fill('deliver'), bad];
          const moving = hosts.move(hosts.a, hosts.b, vtpm);
          if (at >= 6) {
            // The line is down until both have been restarted: nobody can have been told.
            hosts.net.fates.push(...Array<Fate>(40).fill('cut-before'));
          }
          for (const name of restarts) await hosts.restart(hosts[name]);
          hosts.net.fates = [];
          await moving.catch(() => undefined);
          await hosts.settle(hosts.a);
          const lives = await hosts.livesAt(vtpm);
          assert.equal(lives.length, 1);
          assert.equal(lives[0]?.permanent, 'saved');
          await hosts.close();
        },
      ),
      { numRuns: 20 },
    );
  });

  it('I-3 stay in doubt where the departure is on the disk, and the TPM has not counted it', async () => {
    const hosts = await TwoHosts.create();
    const { a, b } = hosts;
    const vtpm = await hosts.stopped(a, 'saved');
    const counter = a.world.anchor.counter as MemoryCounter;
    // The manager is told to stop while its TPM does not answer.
    counter.beforeIncrement = () => {
      a.world.store.stopWaiting();
      void a.control.close();
      throw new Error('the TPM does not answer');
    };
    const end = await hosts.move(a, b, vtpm);
    assert.equal(end.at, 'in-doubt');
    counter.beforeIncrement = () => undefined;
    await hosts.restart(a);
    assert.equal((await a.world.registry.departures.pending()).length, 1);
    await hosts.settle(a);
    const lives = await hosts.livesAt(vtpm);
    assert.deepEqual(
      lives.map(({ host, permanent }) => [host.name, permanent]),
      [['a', 'saved']],
    );
    await hosts.close();
  });

  it('I-3 leave it to the source where the destination is said to be gone, and is; it forgets nothing before it has heard that', async () => {
    const hosts = await TwoHosts.create();
    const { a, b, net } = hosts;
    const { vtpm, migrationId, moving, resolve } = await hosts.doubtful();
    await assert.rejects(a.control.checkNotNeeded(a.peer('b')), refused('in-doubt'));
    // It takes the line, whatever becomes of that.
    await assert.rejects(resolve(), refused('not-fenced'));
    // Nor is one gone that lets nobody in.
    net.onDial = () => {
      throw new ManagerError('peer-closed', 'it closes the line');
    };
    await assert.rejects(resolve(), refused('not-fenced'));
    net.onDial = () => undefined;
    net.isDown = true;
    // An inquiry that is under way may have a line still, and nothing is to get through on it.
    await until('the next inquiry has none', () => net.inVain.has('a'));
    net.further = 'deliver';
    assert.deepEqual(await resolve(), { verdict: 'ABORT', takenBack: true });
    assert.equal((await moving).at, 'aborted');

    net.isDown = false;
    const settle = async () => {
      const talk = new Talk(net.dial(b, 'a'), 'destination');
      await talk.send('UNSETTLED', { migrationId, vtpmUuid: vtpm.uuid });
      await talk.receive('SETTLED', 5_000).finally(() => talk.channel.close());
    };
    await a.control.checkNotNeeded(a.peer('b'));
    await assert.rejects(settle(), refused('moved'));
    await assert.rejects(b.control.checkNotNeeded(b.peer('a')), refused('in-doubt'));
    assert.equal(await tellRescues(net.dial(b, 'a'), b.rescues), true);
    await settle();
    const lives = await hosts.livesAt(vtpm);
    assert.deepEqual(
      lives.map(({ host, permanent }) => [host.name, permanent]),
      [['a', 'saved']],
    );
    await hosts.close();
  });

  /** Its own next inquiry may come before the one that is ordered: what is said of it differs, and never that it is gone. */
  const stops: [string, (hosts: TwoHosts, stop: () => Promise<void>) => Promise<void>][] = [
    ['has asked nobody', (_, stop) => stop()],
    [
      'finds no line',
      async ({ net }, stop) => {
        net.isDown = true;
        await until('the next inquiry has no line', () => net.inVain.has('a'));
        net.onDial = (from) => void (from === 'a' && stop());
      },
    ],
    [
      'waits for the answer',
      async ({ net }, stop) => {
        net.further = 'deliver';
        net.onMessage = (from) => void (from === 'a' && stop());
      },
    ],
  ];
  for (const [when, prepare] of stops) {
    it(`I-3 do not leave it to a source that is stopped when it ${when}, whatever is said of the destination`, async () => {
      const hosts = await TwoHosts.create();
      const { a } = hosts;
      const { moving, resolve } = await hosts.doubtful();
      await prepare(hosts, () => a.control.close());
      await assert.rejects(resolve(), (error: { code: string }) =>
        ['in-doubt', 'shutting-down', 'not-fenced'].includes(error.code),
      );
      assert.equal((await moving).at, 'in-doubt');
      assert.equal((await a.world.registry.departures.pending()).length, 1);
      await hosts.close();
    });
  }

  it('I-3 leave nothing of it on the way to a destination that is said to be gone, when it goes on at the source', async () => {
    const hosts = await TwoHosts.create();
    const { a, b, net } = hosts;
    const vtpm = await hosts.stopped(a, 'saved');
    // The seventh message is STATE.
    const moving = hosts.moveHeldAt(7, vtpm);
    await until('the state is on its way', () => net.letGo !== undefined);
    net.isDown = true;
    const [doubt] = await a.world.registry.departures.pending();
    assert.ok(doubt);
    a.world.beforeAudit = ({ action }) => {
      if (action === 'migrate-resolve') net.letGo?.();
    };
    const { resolve } = hosts.fenced(vtpm, doubt.departure.migrationId);
    assert.deepEqual(await resolve(), { verdict: 'ABORT', takenBack: true });
    assert.equal((await moving).at, 'aborted');
    const ended = await until('it has ended there too', async () =>
      (await b.control.list()).find(({ state }) => ['committed', 'aborted'].includes(state)),
    );
    assert.equal(ended.state, 'aborted');
    assert.equal(await b.world.registry.record(vtpm.id), undefined);
    await hosts.close();
  });

  it('need each other as peers from the order to the end', async () => {
    const hosts = await TwoHosts.create();
    const { a, b, net } = hosts;
    const vtpm = await hosts.stopped(a, 'saved');
    // The sixth message is READY: nothing is written of the departure.
    const moving = hosts.moveHeldAt(6, vtpm);
    await until('it is to come', () => net.letGo);
    assert.deepEqual(await a.world.registry.departures.pending(), []);
    await assert.rejects(a.control.checkNotNeeded(a.peer('b')), refused('busy'));
    await assert.rejects(b.control.checkNotNeeded(b.peer('a')), refused('busy'));
    net.letGo?.();
    assert.equal((await moving).at, 'committed');
    await a.control.checkNotNeeded(a.peer('b'));
    await until('it is settled', () => b.world.registry.arrivals.unsettled().length === 0);
    await b.control.checkNotNeeded(b.peer('a'));
    await hosts.close();
  });

  it('forget a migration when both have acted on it, also where nobody heard of the tombstone', async () => {
    const hosts = await TwoHosts.create();
    const vtpm = await hosts.stopped(hosts.a, 'saved');
    // The ninth message is SETTLED.
    hosts.net.fates = [...Array<Fate>(8).fill('deliver'), 'cut-before'];
    assert.equal((await hosts.move(hosts.a, hosts.b, vtpm)).at, 'committed');
    const { arrivals } = hosts.b.world.registry;
    await until('the source is heard', () => arrivals.unsettled().length === 0);
    assert.deepEqual((await hosts.b.world.registry.view(vtpm.id)).header.unsettled, []);
    await hosts.close();
  });

  it('I-5 go there and back again with epochs and generations that rise', async () => {
    const hosts = await TwoHosts.create();
    const vtpm = await hosts.stopped(hosts.a, 'saved');
    let [from, to] = [hosts.a, hosts.b];
    let epoch = 0n;
    for (let round = 0; round < 6; round++) {
      assert.equal((await hosts.move(from, to, vtpm)).at, 'committed');
      const { header } = await to.world.registry.view(vtpm.id);
      assert.ok(header.epoch > epoch);
      assert.equal(header.generation, 2n);
      epoch = header.epoch;
      [from, to] = [to, from];
    }
    assert.equal((await hosts.livesAt(vtpm)).length, 1);
    await hosts.close();
  });

  it('I-10 let a manager end though another host keeps the line on which it asked', async () => {
    const hosts = await TwoHosts.create();
    const vtpm = await hosts.stopped(hosts.a, 'saved');
    const talk = new Talk(hosts.net.dial(hosts.a, 'b'), 'source');
    await talk.send('UNSETTLED', { migrationId: randomBytes(16), vtpmUuid: vtpm.uuid });
    await talk.receive('SETTLED', 5_000);
    await hosts.close();
  });

  it('I-10 answer only so many questions about migrations that nobody knows', async () => {
    const hosts = await TwoHosts.create();
    const ask = async (): Promise<string> => {
      const talk = new Talk(hosts.net.dial(hosts.a, 'b'), 'source');
      const names = { migrationId: randomBytes(16), vtpmUuid: randomBytes(16) };
      await talk.send('INQUIRE', { ...names, epoch: 1n, generation: 1n });
      try {
        await talk.receive('DECISION', 5_000);
        return 'decided';
      } catch (error) {
        return (error as { code: string }).code;
      } finally {
        talk.channel.close();
      }
    };
    const told: string[] = [];
    while (told.length < STRANGE_INQUIRIES.burst + 8 && !told.includes('rate-limited'))
      told.push(await ask());
    assert.equal(told.at(-1), 'rate-limited');
    assert.ok(told.length > STRANGE_INQUIRIES.burst);
    await hosts.close();
  });
});
