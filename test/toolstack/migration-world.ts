import assert from 'node:assert/strict';
import { randomBytes, randomUUID } from 'node:crypto';
import { mkdirSync, writeFileSync } from 'node:fs';
import { dirname } from 'node:path';
import { killAt } from '../support/faulty-worker.js';
import {
  Lines,
  type OrderedCall,
  StubToolstackSocket,
  type TestOrder,
  testOrder,
} from './migration-fixture.js';
import {
  buildStubImage,
  removeDirectory,
  StubManager,
  SupervisorProcess,
  temporaryDirectory,
  until,
} from './supervisor-fixture.js';

export type Incoming = ReturnType<MigrationWorld['incoming']>;
type Verdict = 'COMMIT' | 'ABORT';

/** An order that the manager has. */
export interface Begun {
  readonly order: TestOrder;
  readonly lines: Lines;
  readonly call: OrderedCall;
}

const DESCRIPTION = {
  format: 1,
  name: 'web1',
  isolation: 'sandbox',
  autostart: false,
  startup: 'clear',
  doors: ['tpm'],
  stateBlobs: 'reference',
  socketMode: '0600',
};

/** Gives each test of the suite that calls it a world of its own. */
export function withMigrationWorlds(use: (world: MigrationWorld) => void): void {
  let image: string;
  let manifest: string;
  let world: MigrationWorld;
  before(async () => {
    image = temporaryDirectory();
    manifest = await buildStubImage(image);
  });
  after(() => removeDirectory(image));
  beforeEach(async () => {
    world = await MigrationWorld.create(manifest);
    use(world);
  });
  afterEach(() => world.destroy());
}

/** A real supervisor with workers in its sandbox, and a manager that a test plays. */
export class MigrationWorld {
  /** What the supervisor answered to what comes. */
  readonly answers: { migration: string; verb: string; code?: string; message?: string }[] = [];
  supervisor!: SupervisorProcess;
  manager!: StubManager;
  readonly toolstack = new StubToolstackSocket();
  readonly #home = temporaryDirectory();

  private constructor(readonly manifest: string) {}

  static async create(manifest: string): Promise<MigrationWorld> {
    const world = new MigrationWorld(manifest);
    world.supervisor = await world.start();
    const { paths } = world.supervisor;
    world.manager = new StubManager(paths);
    world.manager.onAnswer = (migration, verb, body) => {
      world.answers.push({ migration, verb, ...body });
      if (verb === 'accept') world.manager.migrations.set(migration, { state: 'preparing' });
    };
    await world.manager.start();
    await world.toolstack.start(paths);
    mkdirSync(dirname(paths.toolstack.key), { recursive: true, mode: 0o700 });
    writeFileSync(paths.toolstack.key, Buffer.alloc(32, 7), { mode: 0o600 });
    await world.#connected();
    return world;
  }

  async destroy(): Promise<void> {
    await this.supervisor.end('SIGKILL');
    this.toolstack.stop();
    await this.manager.stop();
    removeDirectory(this.#home);
  }

  /** @param prelude source that runs in it first @param under the command that runs it */
  start(flags: string[] = [], prelude?: string, under: readonly string[] = []): Promise<SupervisorProcess> {
    const first = prelude
      ? ['env', `NODE_OPTIONS=--import=data:text/javascript,${encodeURIComponent(prelude)}`]
      : [];
    const how = { wrapper: [...under, ...first] };
    return new SupervisorProcess(this.#home, this.manifest, ['--log-format', 'json', ...flags], how).ready();
  }

  async restart(...how: Parameters<MigrationWorld['start']>): Promise<void> {
    await this.supervisor.end('SIGKILL');
    this.supervisor = await this.start(...how);
    await this.#connected();
  }

  async #connected(): Promise<void> {
    await until(async () => (await this.supervisor.call('GET', '/health')).body.managerConnected === true);
    this.manager.images.add((await this.supervisor.call('GET', '/image')).body.digest);
  }

  // biome-ignore lint/suspicious/noExplicitAny: what a test expects of it is the test.
  async view(): Promise<any> {
    return (await this.supervisor.call('GET', '/vtpms/web1')).body;
  }

  async state(): Promise<string> {
    return (await this.view()).state;
  }

  becomes(state: string): Promise<void> {
    return until(async () => (await this.state()) === state);
  }

  isGone(): Promise<void> {
    return until(async () => (await this.supervisor.call('GET', '/vtpms')).body.vtpms.length === 0);
  }

  async running(): Promise<{ id: string; vmUuid: string; sockets: { tpm: string } }> {
    const { body } = await this.supervisor.create('web1');
    const started = await this.supervisor.call('POST', '/vtpms/web1/start');
    assert.equal(started.status, 200, JSON.stringify(started.body));
    return { ...body, ...started.body };
  }

  async order(vtpm: { id: string; vmUuid: string }, mode: 'LIVE' | 'OFFLINE' = 'LIVE'): Promise<Begun> {
    const order = testOrder(vtpm, mode);
    const lines = this.lines(order);
    return { order, lines, call: await this.toolstack.next() };
  }

  lines({ body }: TestOrder): Lines {
    return new Lines(this.supervisor.paths.supervisor.socket, '/vtpms/web1/migrate', body);
  }

  async frozen({ call }: Begun): Promise<void> {
    for (const phase of ['CONNECTING', 'FREEZING', 'FROZEN'] as const) call.say(phase);
    await call.heard('reaped');
  }

  incoming(change: Record<string, unknown> = {}) {
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
      description: JSON.stringify(DESCRIPTION),
      dryRun: false,
      ...change,
    };
  }

  /** @param change of the description */
  described(change: Record<string, unknown>): { description: string } {
    return { description: JSON.stringify({ ...DESCRIPTION, ...change }) };
  }

  said(verb: string, { migration }: Incoming): Promise<void> {
    return until(() => this.answers.some((answer) => answer.migration === migration && answer.verb === verb));
  }

  decided({ migration, id }: Incoming, verdict: Verdict): void {
    this.manager.migrations.delete(migration);
    this.manager.emit({ type: 'migration', migration, id, role: 'destination', verdict });
  }

  /** A Load that waits for what it is to get. */
  holdLoads(event: Incoming): { commit(): void; abort(): void; readonly begun: Promise<void> } {
    const { manager } = this;
    let begin = (): void => {};
    let go = (): void => {};
    const begun = new Promise<void>((resolve) => {
      begin = resolve;
    });
    const over = new Promise<void>((resolve) => {
      go = resolve;
    });
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

  /** The supervisor of a vTPM that leaves is killed at a step; the next one does what the manager's record says. */
  async killDeparting(barrier: string, verdict: Verdict): Promise<void> {
    await this.restart([], killAt(barrier, 1));
    const vtpm = await this.running();
    const order = testOrder(vtpm, 'LIVE');
    const lines = this.lines(order);
    lines.ended.catch(() => undefined);
    void this.toolstack.next().then(async (call) => {
      for (const phase of ['FREEZING', 'FROZEN'] as const) call.say(phase);
      await call.heard('reaped');
      call.end(verdict === 'COMMIT' ? 'COMMITTED' : 'ABORTED');
    });
    const isSettled = barrier === 'migrate.source.settled';
    // One that is aborted is not settled there.
    if (isSettled && verdict === 'ABORT') {
      await lines.ended;
      await this.becomes('running');
      return;
    }
    await this.supervisor.end();
    const record = this.manager.records.get(vtpm.id)!;
    const left = verdict === 'COMMIT' ? ({ kind: 'moved' } as const) : { isSuspended: true };
    this.manager.records.set(vtpm.id, { ...record, ...left });
    this.manager.migrations.set(order.migration, { state: 'departing' });
    const { askedForMigrations: asked } = this.manager;
    await this.restart();
    // What it is told twice it has understood once.
    this.manager.emit({ type: 'migration', migration: order.migration, id: vtpm.id });
    await until(
      async () => this.manager.askedForMigrations >= asked + 2 || (await this.state()) !== 'migrating',
    );
    assert.equal(await this.state(), isSettled ? 'moved' : 'migrating');
    this.manager.migrations.delete(order.migration);
    await this.manager.stop();
    await this.manager.start();
    await this.becomes(verdict === 'COMMIT' ? 'moved' : 'running');
    if (verdict === 'COMMIT') return;
    const [before, now] = this.manager.tickets.slice(-2);
    assert.deepEqual(now!.verbs, ['RESUME']);
    assert.deepEqual(now!.vmRunId, before!.vmRunId, 'the same run of its VM');
  }

  /** The same of a vTPM that comes. */
  async killArriving(barrier: string, verdict: Verdict): Promise<void> {
    await this.restart([], killAt(barrier, 1));
    const event = this.incoming();
    const load = this.holdLoads(event);
    this.manager.emit(event);
    const isServed = barrier.endsWith('serving') || barrier.endsWith('shown');
    if (isServed) {
      await load.begun;
      load.commit();
    }
    await this.supervisor.end();
    this.manager.beforeLoad = undefined;
    this.manager.migrations.delete(event.migration);
    if (verdict === 'COMMIT') {
      const { vmUuid } = event;
      const record = { vmUuid, kind: 'live', epoch: 8, generation: 9, isSuspended: !isServed } as const;
      this.manager.records.set(event.id, record);
    }
    await this.restart();
    if (verdict === 'ABORT') return await this.isGone();
    // One that no worker had waited for is as it came; one that was served is as any whose supervisor was killed.
    const state = isServed ? 'crashed' : barrier.endsWith('entry') ? 'stopped' : 'running';
    await this.becomes(state);
  }
}
