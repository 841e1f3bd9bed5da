import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { DEFAULT_LIMITS } from 'vtpm-manager/grpc/limits';
import { encode, SAVE_PATH } from 'vtpm-proto';
import { connectGuest } from 'vtpm-quickstart/guest';
import { Installation } from '../support/installation.js';
import { GuestLoad, type Tally } from '../support/load.js';
import { until } from '../support/until.js';
import { type TestSession, TestToolstack, testVtpm, WorkerClient } from '../support/worker-client.js';

const STATE = Buffer.alloc(128 * 1024, 0x5a);
const PIPELINED = 32;
/** Fewer than the connections that a uid may make at once: it is the victim's uid too. */
const MOST_KNOCKS = 1_000;

/** A worker that has its own vTPM, and nothing good in mind. */
class HostileWorker {
  readonly #clients: WorkerClient[] = [];
  #isOver = false;
  #running: Promise<unknown> | undefined;
  /** The newest generation that its flood has made. */
  generation = 0n;
  refused = 0;

  constructor(
    private readonly socket: string,
    private readonly managerId: Buffer,
    private readonly toolstack: TestToolstack,
  ) {}

  async begin(): Promise<void> {
    const vtpm = testVtpm();
    const worker = this.#connect();
    const grant = await worker.load(this.toolstack.ticket(this.managerId, vtpm, worker.keys.publicKey));
    const session = await worker.session(vtpm, grant);
    this.#running = Promise.all([this.#flood(session), this.#knock()]);
  }

  async stop(): Promise<void> {
    this.#isOver = true;
    await this.#running;
    for (const client of this.#clients) client.close();
  }

  /** Large saves, many sent ahead, without end. */
  async #flood(session: TestSession): Promise<void> {
    const send = (): void => {
      const frame = session.saveFrame(++session.sequence, { permanent: STATE });
      session.stream?.sendBytes(encode('WorkerFrame', frame));
    };
    for (let ahead = 0; ahead < PIPELINED; ahead++) send();
    while (!this.#isOver) {
      this.generation = (await session.ack()).generation;
      send();
    }
  }

  /** New connections with nonsense, and streams that say nothing and stay. */
  async #knock(): Promise<void> {
    for (let count = 0; count < MOST_KNOCKS && !this.#isOver; count++) {
      const client = this.#connect();
      for (let stream = 0; stream < DEFAULT_LIMITS.streams - 1; stream++) client.openStream();
      await client.call(SAVE_PATH, Buffer.alloc(512 * 1024, 0xff)).catch(() => this.refused++);
    }
  }

  #connect(): WorkerClient {
    const client = new WorkerClient(this.socket, this.managerId);
    this.#clients.push(client);
    return client;
  }
}

describe('I-8 a hostile neighbour', function () {
  this.timeout(120_000);
  let installation: Installation;
  before(async () => {
    installation = await Installation.create();
    await installation.start();
  });
  after(() => installation?.destroy());

  it('that floods the manager with saves, nonsense and silent streams does not stop another guest', async () => {
    const guest = await connectGuest(await installation.vtpm('victim'));
    await guest.defineCounter();
    const start = await guest.counter();
    await guest.close();
    const pid = await installation.workerPid('victim');
    const tally: Tally = { attempted: start, acknowledged: start, seen: start };

    const { managerId } = JSON.parse(readFileSync(installation.paths.toolstack.managerIdentity, 'utf8'));
    const image = String((await installation.supervisord('GET', '/image')).body.digest);
    const seed = readFileSync(installation.paths.toolstack.key);
    const hostile = new HostileWorker(
      installation.paths.manager.workerSocket,
      Buffer.from(managerId, 'hex'),
      new TestToolstack(seed, Buffer.from(image, 'hex')),
    );
    await hostile.begin();
    await until('the flood is there', () => hostile.generation > 10n && hostile.refused > 10);
    const flooded = hostile.generation;
    const load = await GuestLoad.begin(installation.door('victim'), tally);
    await until('the guest goes on beside it', () => tally.acknowledged >= start + 50n, 60_000);
    assert.ok(hostile.generation > flooded, 'positive control: the flood went on meanwhile');
    const another = await connectGuest(await installation.vtpm('another'));
    await another.close();
    await load.stop();
    await hostile.stop();

    const after = await connectGuest(installation.door('victim'));
    assert.equal(await after.counter(), tally.acknowledged);
    assert.equal(await installation.workerPid('victim'), pid, 'the same worker');
    await after.close();
    const { body } = await installation.admin('GET', '/health');
    assert.equal(body.status, 'ready');
  });
});
