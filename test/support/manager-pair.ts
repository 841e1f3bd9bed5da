import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { once } from 'node:events';
import { type ClientRequest, type IncomingMessage, request } from 'node:http';
import { createInterface } from 'node:readline';
import { Client, type ClientDuplexStream, credentials, type ServiceError } from '@grpc/grpc-js';
import { bootId, monotonicMs } from 'vtpm-common';
import {
  boxKeyPair,
  decode,
  encode,
  type LoadGrant,
  MIGRATE_PATH,
  type MigrateCommand,
  type MigrateMode,
  type MigrateOrder,
  type MigratePhase,
  type MigrateProgress,
  type SignedMigrateOrder,
  signMigrateOrder,
  type Verb,
} from 'vtpm-proto';
import { check } from './admin-description.js';
import { freePort } from './free-port.js';
import { type Answer, ManagerInstallation } from './manager-process.js';
import { type Swtpm, startSwtpm } from './swtpm.js';
import {
  RefusedError,
  type TestSession,
  type TestVtpm,
  testVtpm,
  type WorkerClient,
} from './worker-client.js';

const pass = (bytes: Buffer): Buffer => bytes;
/** Of the VM run that every ticket of a test names. */
const RUN = Buffer.alloc(16, 1);
/** What the VMM of a test holds. */
export const REFERENCE_DIGEST = Buffer.alloc(32, 9);

/** One line of the manager's event stream. */
export type EventLine = Readonly<Record<string, unknown>> & { readonly type: string };

/** What happens at a manager, until it goes. */
export class EventTail {
  readonly lines: EventLine[] = [];
  readonly #waiting: { is: (line: EventLine) => boolean; found: (line: EventLine) => void }[] = [];

  private constructor(private readonly call: ClientRequest) {}

  static async of(socketPath: string): Promise<EventTail> {
    const call = request({ socketPath, method: 'GET', path: '/events' });
    call.on('error', () => undefined);
    call.end();
    const tail = new EventTail(call);
    const [response] = (await once(call, 'response')) as [IncomingMessage];
    response.on('error', () => undefined);
    const lines = createInterface({ input: response });
    // It is cut off with the manager, or by `close`.
    lines.on('error', () => undefined);
    lines.on('line', (text) => tail.#take(JSON.parse(text) as EventLine));
    await tail.next('hello');
    return tail;
  }

  /** The first line of this type that nobody has taken, past or to come. */
  next(type: string): Promise<EventLine> {
    const is = (line: EventLine): boolean => line.type === type;
    const at = this.lines.findIndex(is);
    const [line] = at >= 0 ? this.lines.splice(at, 1) : [];
    if (line) return Promise.resolve(line);
    return new Promise((found) => this.#waiting.push({ is, found }));
  }

  close(): void {
    this.call.destroy();
  }

  #take(line: EventLine): void {
    if (line.type === 'incoming' || line.type === 'migration')
      check(['components', 'schemas', 'Event'], line);
    const at = this.#waiting.findIndex(({ is }) => is(line));
    if (at >= 0) this.#waiting.splice(at, 1)[0]?.found(line);
    else this.lines.push(line);
  }
}

/** A manager on a chip of its own, and a stand-in for its toolstack. */
export class PairedHost {
  readonly manager = new ManagerInstallation();
  managerId = '';
  hostId = Buffer.alloc(0);
  port = 0;
  events!: EventTail;
  #identity: Record<string, unknown> = {};
  #restarts: object = {};

  constructor(
    readonly name: string,
    readonly tpm: Swtpm,
    private readonly pcrs: string,
  ) {}

  async init(): Promise<void> {
    const made = await this.manager.init(`unix:${this.tpm.socket}`, '--pcrs', this.pcrs);
    this.managerId = String(made.managerId);
    this.port = await freePort('127.0.0.1');
    await this.start();
    const image = this.manager.toolstack.imageDigest.toString('hex');
    await this.call('POST', '/images', { digest: image, note: '' }, 201);
    this.#identity = await this.call('GET', '/identity');
    this.hostId = Buffer.from(String(this.#identity.hostId), 'hex');
  }

  async start(options: { readonly nodeArgs?: readonly string[] } = this.#restarts): Promise<void> {
    const args = ['--peer-listen', `127.0.0.1:${this.port}`];
    const { status } = await this.manager.start({ ...options, args });
    assert.equal(status, 'ready');
    this.events = await EventTail.of(this.manager.paths.adminSocket);
  }

  async stop(signal: NodeJS.Signals = 'SIGTERM'): Promise<void> {
    this.events.close();
    await this.manager.stop(signal);
  }

  /** @throws where it answers with another status */
  async call(method: string, path: string, body?: object, status = 200): Promise<Record<string, unknown>> {
    const answer = await this.manager.admin(method, path, body);
    assert.equal(answer.status, status, `${method} ${path}: ${JSON.stringify(answer.body)}`);
    if (path.startsWith('/migrations')) checkMigrationAnswer(method, path, answer);
    return answer.body;
  }

  async knows(other: PairedHost, changes: object = {}): Promise<void> {
    const { identity, endorsement } = other.#identity as {
      identity: string;
      endorsement: { fingerprint: string };
    };
    const peer = {
      name: other.name,
      identity,
      ekFingerprint: endorsement.fingerprint,
      addresses: [`127.0.0.1:${other.port}`],
      approveCurrent: true,
      ...changes,
    };
    await this.call('POST', '/peers', peer, 201);
  }

  async vtpm(id: string): Promise<Record<string, unknown>> {
    return await this.call('GET', `/vtpms/${id}`);
  }

  async migrations(): Promise<Record<string, unknown>[]> {
    return (await this.call('GET', '/migrations')).migrations as Record<string, unknown>[];
  }

  /** A worker of this host, that loads the vTPM at its newest epoch. */
  async worker(vtpm: TestVtpm, verbs: Verb[] = ['COLD'], epoch?: bigint): Promise<HostWorker> {
    const expectedEpoch = epoch ?? BigInt(((await this.vtpm(vtpm.id)).epoch as number) ?? 0);
    const worker = new HostWorker(this, vtpm);
    await worker.load(verbs, expectedEpoch);
    return worker;
  }

  /** One that has saved `permanent` for the first time. */
  async manufactured(permanent = 'P1', vtpm = testVtpm()): Promise<HostWorker> {
    const worker = new HostWorker(this, vtpm);
    await worker.load(['MANUFACTURE'], 0n);
    await worker.session.save({ permanent: Buffer.from(permanent) });
    return worker;
  }

  async order(
    vtpm: TestVtpm,
    to: PairedHost,
    changes: Partial<MigrateOrder> = {},
  ): Promise<SignedMigrateOrder> {
    const { epoch, generation } = await this.vtpm(vtpm.id);
    const { key } = this.manager.toolstack;
    return signMigrateOrder(key, {
      format: 1,
      managerId: Buffer.from(this.managerId, 'hex'),
      toolstackKey: key.publicKey,
      vtpmUuid: vtpm.uuid,
      vmUuid: vtpm.vmUuid,
      destination: to.hostId,
      expectedEpoch: BigInt(epoch as number),
      leastGeneration: BigInt(generation as number),
      migrationId: randomBytes(16),
      bootId: bootId(),
      expiresAtMonotonicMs: monotonicMs() + 60_000n,
      mode: 'OFFLINE' as MigrateMode,
      dryRun: false,
      description: Buffer.from('{"name":"web1"}'),
      ...changes,
    });
  }

  /** Gives the order; what the toolstack has to say after that is the caller's. */
  give(order: SignedMigrateOrder): GivenOrder {
    return new GivenOrder(this.manager.paths.toolstackSocket, order);
  }

  /** Takes the next vTPM that comes. */
  async acceptNext(): Promise<EventLine> {
    const incoming = await this.events.next('incoming');
    await this.call('POST', `/migrations/${String(incoming.migration)}/accept`, {});
    return incoming;
  }

  async destroy(): Promise<void> {
    this.events?.close();
    await this.manager.remove();
    await this.tpm.stop();
  }
}

/** A worker as far as the manager sees it, with a reader that keeps what comes unasked. */
export class HostWorker {
  readonly keys = boxKeyPair();
  readonly client: WorkerClient;
  session!: TestSession;
  grant!: LoadGrant;

  constructor(
    readonly host: PairedHost,
    readonly vtpm: TestVtpm,
  ) {
    this.client = host.manager.worker(host.managerId);
  }

  async load(verbs: Verb[], expectedEpoch: bigint): Promise<LoadGrant> {
    const { toolstack } = this.host.manager;
    const changes = { verbs, expectedEpoch, vmRunId: RUN };
    this.grant = await this.client.load(
      toolstack.ticket(this.client.managerId, this.vtpm, this.client.keys.publicKey, changes),
    );
    this.session = await this.client.session(this.vtpm, this.grant);
    return this.grant;
  }

  /** Waits for the freeze of a migration and does what a worker does then. */
  async suspends(volatile = 'V'): Promise<void> {
    const { session } = this;
    const stream = session.stream;
    assert.ok(stream);
    const freeze = await stream.next();
    assert.equal(freeze.type, 'FREEZE');
    assert.equal(decode('Freeze', session.cipher.openManager(freeze)).suspend, true);
    await session.save({
      permanent: Buffer.from('P-suspended'),
      volatile: Buffer.from(volatile),
      use: { action: 'SUSPEND', digest: REFERENCE_DIGEST },
    });
    stream.send(session.cipher.sealWorker('FROZEN', freeze.sequence, new Uint8Array(0)));
  }

  async end(): Promise<void> {
    this.session.stream?.end();
    await this.session.stream?.ended;
    this.client.close();
  }
}

/** The toolstack's end of Migrate. */
export class GivenOrder {
  readonly progress: MigrateProgress[] = [];
  /** Resolves when the call has ended: with the refusal, or undefined. */
  readonly refused: Promise<RefusedError | undefined>;
  readonly #client: Client;
  readonly #call: ClientDuplexStream<Buffer, Buffer>;
  #onProgress: () => void = () => undefined;

  constructor(socket: string, order: SignedMigrateOrder) {
    this.#client = new Client(`unix:${socket}`, credentials.createInsecure(), {
      'grpc.use_local_subchannel_pool': 1,
    });
    this.#call = this.#client.makeBidiStreamRequest(MIGRATE_PATH, pass, pass) as ClientDuplexStream<
      Buffer,
      Buffer
    >;
    this.#call.on('data', (bytes: Buffer) => {
      this.progress.push(decode('MigrateProgress', bytes));
      this.#onProgress();
    });
    this.refused = new Promise((resolve) => {
      let refusal: RefusedError | undefined;
      this.#call.on('error', (error: ServiceError) => {
        refusal = new RefusedError(error);
      });
      this.#call.on('status', () => setImmediate(() => resolve(refusal)));
    });
    void this.refused.then(() => {
      this.#onProgress();
      this.#client.close();
    });
    this.say({ order });
  }

  say(command: MigrateCommand): void {
    this.#call.write(encode('MigrateCommand', command));
  }

  get phases(): MigratePhase[] {
    return this.progress.map(({ phase }) => phase);
  }

  /** Resolves when it has come to a phase. @throws with what it came to where it ends before */
  async reaches(phase: MigratePhase): Promise<void> {
    let isOver = false;
    void this.refused.then(() => {
      isOver = true;
    });
    for (;;) {
      if (this.phases.includes(phase)) return;
      if (isOver)
        throw new Error(
          `it ended as ${JSON.stringify(this.last, (_, v) => (typeof v === 'bigint' ? String(v) : v))}`,
        );
      await new Promise<void>((resolve) => {
        this.#onProgress = resolve;
      });
    }
  }

  /** The worker has ended, as soon as it is frozen; then to the end. */
  async carryOut(): Promise<MigrateProgress | undefined> {
    await this.reaches('FROZEN');
    this.say({ reaped: {} });
    return await this.end();
  }

  async end(): Promise<MigrateProgress | undefined> {
    const refusal = await this.refused;
    if (refusal) throw refusal;
    return this.last;
  }

  get last(): MigrateProgress | undefined {
    return this.progress.at(-1);
  }

  /** The toolstack says no more, and listens. */
  hangUp(): void {
    this.#call.end();
  }

  /** The toolstack goes without a word. */
  leave(): void {
    this.#call.cancel();
  }
}

/** Two managers that know each other, each on its own chip, over TLS on the loopback interface. */
export class ManagerPair {
  private constructor(
    readonly a: PairedHost,
    readonly b: PairedHost,
  ) {}

  static async create(pcrs = 'sha256:16'): Promise<ManagerPair> {
    const [one, other] = await Promise.all([startSwtpm(), startSwtpm()]);
    const a = new PairedHost('a', one, pcrs);
    const b = new PairedHost('b', other, pcrs);
    const pair = new ManagerPair(a, b);
    try {
      await Promise.all([a.init(), b.init()]);
      await Promise.all([a.knows(b), b.knows(a)]);
      return pair;
    } catch (error) {
      await pair.destroy();
      throw error;
    }
  }

  async destroy(): Promise<void> {
    await Promise.all([this.a.destroy(), this.b.destroy()]);
  }
}

/** As docs/admin-api.yaml has it. */
function checkMigrationAnswer(method: string, path: string, { status, body }: Answer): void {
  const place = path.replace(/[0-9a-f]{32}/, '{migration}');
  const schema = ['content', 'application/json', 'schema'];
  const responses = ['paths', place, method.toLowerCase(), 'responses'];
  check(
    status === 404
      ? ['components', 'responses', 'Error', ...schema]
      : [...responses, String(status), ...schema],
    body,
  );
}
