import assert from 'node:assert/strict';
import { AsyncLocalStorage } from 'node:async_hooks';
import { setImmediate } from 'node:timers/promises';
import fc from 'fast-check';
import { ManagerError } from 'vtpm-manager';
import { openState } from 'vtpm-manager/records/index';
import type { AnchorCounter } from 'vtpm-manager/root-tpm/index';
import type { AnchorOptions } from 'vtpm-manager/store/index';
import type { RecordHeader, SignedDecision } from 'vtpm-proto';
import { isA } from '../support/is-a.js';
import { MemoryCounter } from '../support/memory-counter.js';
import { MemoryStore } from '../support/memory-store.js';
import { testVtpm } from '../support/worker-client.js';
import { decisionIn, Journey, REFERENCE, type Waiting } from './migration-fixture.js';
import { Worker, World } from './ownership-fixture.js';

/** What a process that was killed throws wherever it goes on. */
class Killed extends Error {}

const HOOK = Symbol.for('vtpm.barrier');
const MODES = ['OFFLINE', 'LIVE', 'VMM'] as const;

/** A process of a manager: what it does when it is dead has no effect on its disk, nor on its TPM. */
class Life {
  /** Steps until the kill; none comes where it is undefined. */
  steps: number | undefined;
  #kill!: (error: Killed) => void;
  #isOver = false;
  /** Rejects when it is killed: what waits for its TPM waits for ever. */
  readonly ended = new Promise<never>((_, reject) => {
    this.#kill = reject;
  });

  constructor() {
    this.ended.catch(() => undefined);
  }

  get isOver(): boolean {
    return this.#isOver;
  }

  kill(): void {
    this.#isOver = true;
    this.#kill(new Killed('killed'));
  }

  barrier(): void {
    if (!this.#isOver && this.steps !== undefined && this.steps-- <= 0) this.kill();
    this.check();
  }

  check(): void {
    if (this.#isOver) throw new Killed('killed');
  }
}

const current = new AsyncLocalStorage<Life>();

/** A host, its manager, and the disk and chip that are left of it. */
class Host {
  life = new Life();
  readonly chip = new MemoryCounter();
  worker: Worker | undefined;

  private constructor(
    readonly name: number,
    readonly world: World,
  ) {}

  static async create(name: number): Promise<Host> {
    const world = await World.create();
    const host = new Host(name, world);
    host.chip.value = await world.anchor.counter.read();
    await host.restart();
    return host;
  }

  /** kill -9 and a start. */
  async restart(): Promise<void> {
    this.life.kill();
    const life = new Life();
    this.life = life;
    const entries = await this.world.disk.list(undefined, Number.MAX_SAFE_INTEGER);
    const disk = new MemoryStore(entries);
    disk.beforeCommit = () => life.check();
    const { chip } = this;
    const counter: AnchorCounter = {
      read: () => chip.read(),
      increment: async (stated) => {
        await stated;
        life.check();
        return await chip.increment();
      },
    };
    const anchor: AnchorOptions = { ...this.world.anchor, counter };
    Object.assign(this.world, { disk, anchor });
    this.worker = undefined;
    await this.world.restart();
  }

  /** Runs something on it; where it was killed meanwhile it is started again. @returns undefined where that came to nothing */
  async run<T>(steps: number | undefined, operation: () => Promise<T>): Promise<T | undefined> {
    const { life } = this;
    life.steps = steps;
    try {
      const run = current.run(life, operation);
      run.catch(() => undefined);
      return await Promise.race([run, life.ended]);
    } catch (error) {
      const isExpected = isA(error, ManagerError) || error instanceof Killed;
      if (!isExpected) throw error;
      return undefined;
    } finally {
      life.steps = undefined;
      if (life.isOver) await this.restart();
    }
  }

  async header(id: string): Promise<RecordHeader | undefined> {
    return (await this.world.registry.record(id))?.header;
  }
}

/** Everything that was ever said or written between the hosts of a test, for whoever repeats it. */
interface Attempt {
  readonly from: Host;
  readonly to: Host;
  readonly journey: Journey;
  waiting: Waiting | undefined;
}

class Model {
  readonly vtpm = testVtpm();
  readonly attempts: Attempt[] = [];
  readonly decisions: SignedDecision[] = [];
  readonly log: string[] = [];
  /** What the guest knows to be saved. */
  acknowledged = '';
  #saves = 0;
  #newest = { epoch: 0n, generation: 0n };

  constructor(readonly hosts: readonly Host[]) {}

  async begin(): Promise<void> {
    const [host] = this.hosts;
    const worker = await host!.world.manufactured(this.vtpm);
    host!.worker = worker;
    this.acknowledged = 'P1';
    await this.check();
  }

  /** The supervisor of a host starts a worker wherever it may. */
  async load(host: Host, steps: number | undefined): Promise<void> {
    const header = await host.header(this.vtpm.id);
    const worker = new Worker(host.world, this.vtpm);
    await host.run(steps, async () => {
      await worker.load({ expectedEpoch: header?.epoch ?? 0n, verbs: ['RESUME', 'COLD'] });
      await worker.connect();
      host.worker = worker;
    });
  }

  async save(host: Host, steps: number | undefined): Promise<void> {
    const { worker } = host;
    if (!worker?.stream) return;
    const text = `P-${++this.#saves}`;
    const ack = await host.run(steps, () => worker.save(text));
    if (ack) this.acknowledged = text;
    // What was not acknowledged may be there, or not.
    else await this.#learn(host, text);
  }

  async expect(from: Host, to: Host, mode: (typeof MODES)[number], steps: number | undefined): Promise<void> {
    const header = await from.header(this.vtpm.id);
    if (!header) return;
    const worker = from.worker ?? new Worker(from.world, this.vtpm);
    const journey = new Journey(from.world, to.world, worker, mode);
    const hello = await journey.hello();
    await to.run(steps, () => journey.expect({}, hello));
    const attempt: Attempt = { from, to, journey, waiting: undefined };
    this.attempts.push(attempt);
    if (!journey.expected || mode === 'OFFLINE') return;
    const late = new Worker(to.world, this.vtpm);
    attempt.waiting = journey.loadOf(late, { expectedEpoch: header.epoch }, REFERENCE);
  }

  async suspend({ from, journey }: Attempt, steps: number | undefined): Promise<void> {
    const text = 'P-suspended';
    if (from.worker !== journey.worker || !journey.worker.stream) return;
    await from.run(steps, () => journey.suspend());
    await this.#learn(from, text);
  }

  async depart({ from, journey }: Attempt, steps: number | undefined): Promise<void> {
    await from.run(steps, () => journey.depart());
  }

  async commit({ to, journey, waiting }: Attempt, steps: number | undefined): Promise<void> {
    if (!journey.expected || !journey.state) return;
    const { expected } = journey;
    const signed = await to.run(steps, async () => {
      const committed = journey.commit();
      committed.catch(() => undefined);
      // In mode VMM the Load that it waits for may have gone. Nothing here waits for anything outside this process.
      for (let turn = 0; turn < 50; turn++) await setImmediate();
      expected.release(new ManagerError('migration-aborted', 'nobody comes for it'));
      return await committed;
    });
    if (signed) this.decisions.push(signed);
    if (signed && waiting) {
      to.worker = waiting.worker;
      await to.run(undefined, async () => {
        await waiting.grant;
        await waiting.worker.connect();
      });
    }
  }

  /** The source asks what it says in its own record. */
  async ask({ from, to }: Attempt, steps: number | undefined): Promise<void> {
    const departure = (await from.header(this.vtpm.id))?.departure;
    if (!departure) return;
    const { migrationId, epoch, generation } = departure;
    const source = from.world.keys.hostKey.publicKey;
    if (Buffer.compare(departure.destination, to.world.keys.hostKey.publicKey) !== 0) return;
    const inquiry = { migrationId, epoch, generation, source, vtpmUuid: this.vtpm.uuid };
    const signed = await to.run(steps, () => to.world.registry.arrivals.abort(inquiry));
    if (signed) this.decisions.push(signed);
  }

  /** Any decision that was ever made, to any host, as what it is or as what it is not. */
  async hear(
    host: Host,
    signed: SignedDecision,
    asCommit: boolean,
    steps: number | undefined,
  ): Promise<void> {
    const { departures } = host.world.registry;
    const { id } = this.vtpm;
    await host.run(steps, () => (asCommit ? departures.commit(id, signed) : departures.abort(id, signed)));
  }

  async settle({ from, to, journey }: Attempt, steps: number | undefined): Promise<void> {
    const departure = (await from.header(this.vtpm.id))?.departure;
    const isPending = (await from.header(this.vtpm.id))?.kind === 'LIVE' && departure;
    // An honest source says it only when it is so.
    if (isPending && Buffer.compare(departure.migrationId, journey.migrationId) === 0) return;
    const source = from.world.keys.hostKey.publicKey;
    await to.run(steps, () => to.world.registry.arrivals.settled(journey.migrationId, source));
  }

  /** Until every host knows, with the network whole and nobody killed. */
  async resolveAll(): Promise<void> {
    for (const host of this.hosts) {
      const departure = (await host.header(this.vtpm.id))?.departure;
      if (!departure || (await host.header(this.vtpm.id))?.kind !== 'LIVE') continue;
      const to = this.hosts.find(
        (other) => Buffer.compare(other.world.keys.hostKey.publicKey, departure.destination) === 0,
      )!;
      const journey = new Journey(host.world, to.world, new Worker(host.world, this.vtpm), 'OFFLINE');
      const before = this.decisions.length;
      await this.ask({ from: host, to, journey, waiting: undefined }, undefined);
      assert.equal(this.decisions.length, before + 1, 'the destination has an answer');
      const signed = this.decisions.at(-1)!;
      await this.hear(host, signed, decisionIn(signed).verdict === 'COMMIT', undefined);
    }
  }

  /** Where it is on its way its old state is not what counts: the destination may have gone on. */
  async #learn(host: Host, text: string): Promise<void> {
    const header = await host.header(this.vtpm.id);
    if (header?.kind !== 'LIVE' || header.departure) return;
    if ((await this.#stateAt(host)) === text) this.acknowledged = text;
  }

  async #stateAt({ world }: Host): Promise<string | undefined> {
    const record = await world.registry.record(this.vtpm.id);
    if (record?.header.kind !== 'LIVE') return undefined;
    return openState(world.keys, record).permanent?.toString('utf8');
  }

  /** The promise: one host at most lets a Load through, and it has everything that was acknowledged. */
  async check(): Promise<void> {
    const headers = await Promise.all(this.hosts.map((host) => host.header(this.vtpm.id)));
    const owners = this.hosts.filter((_, at) => headers[at]?.kind === 'LIVE' && !headers[at]?.departure);
    const undecided = headers.filter((header) => header?.kind === 'LIVE' && header.departure);
    assert.ok(owners.length <= 1, `hosts ${owners.map(({ name }) => name)} all let a Load through`);
    assert.ok(owners.length + undecided.length >= 1, 'nobody has it any more');
    const [owner] = owners;
    if (!owner) return;
    const { epoch, generation } = headers[this.hosts.indexOf(owner)]!;
    assert.ok(epoch >= this.#newest.epoch, `epoch ${epoch} after ${this.#newest.epoch}`);
    assert.ok(
      generation >= this.#newest.generation,
      `generation ${generation} after ${this.#newest.generation}`,
    );
    this.#newest = { epoch, generation };
    assert.equal(await this.#stateAt(owner), this.acknowledged);
  }
}

/** One thing that happens, by a name for the counterexample. */
class Step {
  constructor(
    readonly name: string,
    readonly run: (model: Model) => Promise<void>,
  ) {}

  [fc.toStringMethod](): string {
    return this.name;
  }
}

const killAt = (steps: number | undefined): string => (steps === undefined ? '' : `, killed at ${steps}`);

const kill = fc.option(fc.nat(12), { nil: undefined, freq: 2 });
const host = fc.nat(2);
/** Most often the newest: that is the one that gets anywhere. */
const attempt = fc.oneof({ weight: 4, arbitrary: fc.constant(0) }, { weight: 1, arbitrary: fc.nat(5) });

function atHost(name: 'load' | 'save', weight: number) {
  const arbitrary = fc
    .tuple(host, kill)
    .map(
      ([at, steps]) =>
        new Step(`${name} at ${at}${killAt(steps)}`, (model) => model[name](model.hosts[at]!, steps)),
    );
  return { weight, arbitrary };
}

function ofAttempt(name: 'suspend' | 'depart' | 'commit' | 'ask' | 'settle', weight: number) {
  const arbitrary = fc.tuple(attempt, kill).map(
    ([back, steps]) =>
      new Step(`${name} of the last but ${back}${killAt(steps)}`, async (model) => {
        const chosen = model.attempts.at(-1 - back) ?? model.attempts.at(-1);
        if (chosen) await model[name](chosen, steps);
      }),
  );
  return { weight, arbitrary };
}

const expecting = fc.tuple(host, host, fc.constantFrom(...MODES), kill).map(
  ([from, to, mode, steps]) =>
    new Step(`expect ${from} to ${to} ${mode}${killAt(steps)}`, async (model) => {
      if (from !== to) await model.expect(model.hosts[from]!, model.hosts[to]!, mode, steps);
    }),
);

const hearing = fc.tuple(host, attempt, fc.boolean(), kill).map(
  ([at, back, isAsItIs, steps]) =>
    new Step(
      `hear at ${at} the last but ${back}${isAsItIs ? '' : ' as the other'}${killAt(steps)}`,
      async (model) => {
        const signed = model.decisions.at(-1 - back);
        if (!signed) return;
        const isCommit = decisionIn(signed).verdict === 'COMMIT';
        await model.hear(model.hosts[at]!, signed, isCommit === isAsItIs, steps);
      },
    ),
);

const restarting = host.map((at) => new Step(`restart ${at}`, (model) => model.hosts[at]!.restart()));

/** A whole way, so that much happens in a run; each of its parts may be killed. */
const whole = fc
  .tuple(host, host, fc.constantFrom(...MODES), fc.array(kill, { minLength: 6, maxLength: 6 }))
  .map(
    ([from, to, mode, kills]) =>
      new Step(`${mode} ${from} to ${to}${kills.map(killAt).join('')}`, async (model) => {
        const [source, destination] = [model.hosts[from]!, model.hosts[to]!];
        if (from === to) return;
        if (mode === 'OFFLINE') await source.restart();
        else await model.load(source, undefined);
        await model.expect(source, destination, mode, kills[0]);
        const made = model.attempts.at(-1);
        if (!made) return;
        if (mode !== 'OFFLINE') await model.suspend(made, kills[1]);
        await model.depart(made, kills[2]);
        await model.commit(made, kills[3]);
        const signed = model.decisions.at(-1);
        if (signed) await model.hear(source, signed, decisionIn(signed).verdict === 'COMMIT', kills[4]);
        await model.settle(made, kills[5]);
      }),
  );

const step = fc.oneof(
  atHost('load', 2),
  atHost('save', 2),
  { weight: 2, arbitrary: expecting },
  ofAttempt('suspend', 2),
  ofAttempt('depart', 2),
  ofAttempt('commit', 3),
  ofAttempt('ask', 2),
  ofAttempt('settle', 1),
  { weight: 2, arbitrary: hearing },
  { weight: 1, arbitrary: restarting },
  { weight: 6, arbitrary: whole },
);

/**
 * One vTPM over three hosts, whose managers are killed at any step and hear anything that was ever decided, again and in the
 * wrong place. @throws where two hosts would load it, where it is lost, or where it goes back
 */
export async function checkMigrationModel(runs: number): Promise<void> {
  Object.assign(globalThis, { [HOOK]: () => current.getStore()?.barrier() });
  try {
    let moves = 0;
    await fc.assert(
      fc.asyncProperty(fc.array(step, { minLength: 5, maxLength: 30 }), async (steps) => {
        const model = new Model(await Promise.all([0, 1, 2].map((name) => Host.create(name))));
        await model.begin();
        for (const { run } of steps) {
          await run(model);
          await model.check();
        }
        await model.resolveAll();
        await model.check();
        moves += model.decisions.filter((signed) => decisionIn(signed).verdict === 'COMMIT').length;
      }),
      { numRuns: runs },
    );
    assert.ok(moves > runs / 20, `${moves} moves in all: the property says little`);
  } finally {
    Object.assign(globalThis, { [HOOK]: undefined });
  }
}
