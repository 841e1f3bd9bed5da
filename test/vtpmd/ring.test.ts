import assert from 'node:assert/strict';
import { closeSync, mkdtempSync, openSync, readdirSync, rmSync, writeSync } from 'node:fs';
import { createServer } from 'node:net';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import fc from 'fast-check';
import { fcntl, pipePair, socketFd, socketPair } from 'vtpm-common/libc';
import { FrontendError, RingClient, RingDevice } from 'vtpm-frontend-driver';
import { buildFaultyWorker, killAt } from '../support/faulty-worker.js';
import { isA } from '../support/is-a.js';
import { MiniManager } from '../support/mini-manager.js';
import { memoryOf, RawFrontend, SEAL, SETUP } from '../support/raw-frontend.js';
import { RingDoorway } from '../support/ring-doorway.js';
import { FuzzedRing, pageChanges, sendSetup, setups } from '../support/ring-fuzz.js';
import {
  counterOf,
  createPrimaryRsa,
  getRandom,
  nvDefineCounter,
  nvIncrement,
  nvReadCounter,
  pcrExtend,
  pcrRead,
  responseCode,
} from '../support/tpm-commands.js';
import { until } from '../support/until.js';
import { KeptRun, WorkerProcess } from '../support/worker-process.js';

const INDEX = 0x01500001;
const CANCELED = 0x909;
const F_SETFL = 4;
const refused = (code: string) => (error: unknown) => {
  assert.ok(isA(error, FrontendError), String(error));
  assert.equal(error.code, code, error.message);
  return true;
};

for (const isKept of [true, false])
  describe(`worker: a ring, ${isKept ? 'with' : 'without'} checkpoints`, () => {
    const run = new KeptRun();
    let manager: MiniManager;
    let worker: WorkerProcess;
    let doorway: RingDoorway;

    before(async () => {
      manager = new MiniManager();
      worker = new WorkerProcess(manager);
      await (isKept ? worker.begin(run) : worker.serve());
      doorway = await RingDoorway.open(run);
      doorway.leadTo(worker);
      await worker.connect('tpm').transmit(nvDefineCounter(INDEX));
      await worker.connect('tpm').transmit(nvIncrement(INDEX));
    });
    after(async () => {
      await worker.kill();
      await doorway.close();
      manager.stop();
      run.close();
    });

    const connect = (options: object = {}) => RingClient.connect({ path: doorway.path, ...options });
    const descriptors = () => readdirSync(`/proc/${worker.child.pid}/fd`).length;

    it('leads to the same TPM as the other doors', async () => {
      const [ring, other, raw] = [await connect(), await connect({ pages: 1 }), worker.connect('tpm')];
      const before = counterOf(await raw.transmit(nvReadCounter(INDEX)));
      assert.equal(responseCode(await ring.transmit(nvIncrement(INDEX))), 0);
      assert.equal(counterOf(await other.transmit(nvReadCounter(INDEX))), before + 1n);
      raw.close();
      await ring.close();
      await other.close();
    });

    it('answers many at once, each its own, whether the frontend spins or sleeps', async () => {
      const clients = await Promise.all(
        [0, 1, 2, 3].map((index) => connect({ waits: index === 0 ? 'spinning' : 'adaptive' })),
      );
      await Promise.all(
        clients.map(async (client, index) => {
          const sizes = Array.from({ length: 100 }, (_, round) => 1 + ((index + round) % 32));
          const answers = await Promise.all(sizes.map((size) => client.transmit(getRandom(size))));
          for (const [round, answer] of answers.entries())
            assert.equal(answer.readUInt16BE(10), sizes[round]);
        }),
      );
      for (const client of clients) await client.close();
    });

    it('opens again after it was closed, on the same connection and on another, as often as one likes', async () => {
      const extended = pcrExtend(10, Buffer.alloc(32, 1));
      const device = await RingDevice.connect(doorway.path);
      const use = async (): Promise<string> => {
        const port = await device.open();
        const answered = new Promise<void>((resolve) => {
          port.onNote = () => {
            if (port.isDone) resolve();
          };
        });
        port.submit(pcrRead(10), 0);
        await answered;
        const answer = port.takeAnswer()!;
        device.closePort();
        return answer.toString('hex', answer.length - 32);
      };
      const before = await use();
      const loader = await connect();
      await loader.transmit(extended);
      await loader.close();
      const measured = await use();
      assert.notEqual(measured, before);
      const open = descriptors();
      for (let round = 0; round < 100; round++) assert.equal(await use(), measured);
      for (let round = 0; round < 20; round++) await (await connect()).close();
      await until('nothing is left open', () => descriptors() <= open);
      await device.close();
    });

    it('takes commands beyond one page where the ring has another', async () => {
      // The TPM says that bytes are left over (TPM_RC_SIZE), and not that the command is too long.
      const long = Buffer.concat([getRandom(), Buffer.alloc(4096 - 12, 7)]);
      long.writeUInt32BE(long.length, 2);
      const [small, large] = [await connect({ pages: 1 }), await connect({ pages: 2 })];
      assert.equal(responseCode(await large.transmit(long)), 0x095);
      await assert.rejects(small.transmit(long), refused('bad-command'));
      const fits = Buffer.from(long.subarray(0, 4088));
      fits.writeUInt32BE(fits.length, 2);
      assert.equal(responseCode(await small.transmit(fits)), 0x095);
      await small.close();
      await large.close();
    });

    it('has only locality 0', async () => {
      const client = await connect();
      assert.equal(responseCode(await client.transmit(getRandom(), { locality: 1 })), 0x907);
      assert.equal(responseCode(await client.transmit(getRandom())), 0);
      await client.close();
    });

    it('ends a command that runs early where it is cancelled, and never runs one that waits', async () => {
      const [busy, other] = [await connect(), await connect()];
      const before = counterOf(await other.transmit(nvReadCounter(INDEX)));
      let ran = 0n;
      let dropped = 0;
      let code = 0;
      // An RSA key is sometimes found before anybody can say anything.
      for (let round = 0; round < 50 && (code !== CANCELED || dropped === 0); round++) {
        const [running, waiting] = [new AbortController(), new AbortController()];
        const key = busy.transmit(createPrimaryRsa(), { signal: running.signal });
        const increment = other.transmit(nvIncrement(INDEX), { signal: waiting.signal }).then(
          () => ran++,
          (error: unknown) => {
            refused('aborted')(error);
            dropped++;
          },
        );
        waiting.abort();
        // It is told at once, while the key is still being made.
        await Promise.race([increment, key]);
        running.abort();
        const answer = await key;
        code = responseCode(answer);
        if (code === 0) {
          await busy.transmit(Buffer.from(`80010000000e00000165${answer.toString('hex', 10, 14)}`, 'hex'));
        }
        await increment;
      }
      assert.deepEqual([code, dropped > 0], [CANCELED, true]);
      assert.equal(counterOf(await other.transmit(nvReadCounter(INDEX))), before + ran);
      await busy.close();
      await other.close();
    });

    it('lets go of a command after its deadline, and carries the next one', async () => {
      const client = await connect();
      const late = client.transmit(createPrimaryRsa(), { deadline: 1 });
      const next = client.transmit(getRandom());
      await late.then(
        (answer) =>
          client.transmit(Buffer.from(`80010000000e00000165${answer.toString('hex', 10, 14)}`, 'hex')),
        refused('deadline'),
      );
      assert.equal(responseCode(await next), 0);
      await client.close();
    });

    it('says when its connection is closed', async () => {
      const closed = worker.next('connection-closed');
      const client = await connect();
      await client.close();
      await closed;
    });

    it('I-10: goes on where a frontend makes the event channel block, and sends what the worker reads at once', async () => {
      const frontend = await RawFrontend.connect(doorway.path);
      const memory = memoryOf(8192, SEAL.SHRINK);
      const [here, there] = socketPair();
      frontend.send(SETUP, [memory, there]);
      await until('it is open', () => frontend.said.includes('state=4'));
      // The flags belong to the open file, which is the worker's, too.
      assert.equal(fcntl(there, F_SETFL, 0), 0);
      assert.equal(writeSync(here, Buffer.alloc(4096)), 4096);
      const client = await connect();
      assert.equal(responseCode(await client.transmit(getRandom())), 0);
      await client.close();
      const closed = worker.next('connection-closed');
      frontend.close();
      await closed;
      for (const fd of [memory, here, there]) closeSync(fd);
    });

    it('I-10: refuses by name what is no ring, keeps nothing of it, and answers elsewhere', async () => {
      const [event, eventThere] = socketPair();
      const pipe = pipePair();
      const file = openSync('/proc/self/exe', 'r');
      const listener = createServer().listen(`${doorway.path}.listener`);
      const listening = socketFd(listener);
      const good = memoryOf(8192, SEAL.SHRINK);
      const open = descriptors();
      const own: number[] = [event, eventThere, pipe.read, pipe.write, file, good];
      const memory = (bytes: number, seals: number): number => {
        own.push(memoryOf(bytes, seals));
        return own.at(-1)!;
      };
      const many = Array.from({ length: 250 }, () => good);
      const cases: [string, readonly number[], RegExp][] = [
        [SETUP, [], /two descriptors/],
        [SETUP, [good], /two descriptors/],
        [SETUP, [good, eventThere, good], /two descriptors/],
        [SETUP, many, /two descriptors/],
        [SETUP, [memory(8192, 0), eventThere], /F_SEAL_SHRINK/],
        [SETUP, [memory(8192, SEAL.GROW), eventThere], /F_SEAL_SHRINK/],
        [SETUP, [memory(8192, SEAL.SHRINK | SEAL.WRITE), eventThere], /cannot be written/],
        [SETUP, [memory(0, SEAL.SHRINK), eventThere], /0 bytes/],
        [SETUP, [memory(4095, SEAL.SHRINK), eventThere], /4095 bytes/],
        [SETUP, [memory(5 * 4096, SEAL.SHRINK), eventThere], /20480 bytes/],
        [SETUP, [file, eventThere], /memfd_create/],
        [SETUP, [pipe.read, eventThere], /memfd_create/],
        [SETUP, [event, eventThere], /memfd_create/],
        [SETUP, [good, good], /event channel/],
        [SETUP, [good, pipe.write], /event channel/],
        [SETUP, [good, file], /event channel/],
        [SETUP, [good, listening], /event channel/],
        ['state=3\n\n', [good, eventThere], /feature-protocol-v2/],
        ['state=3\nfeature-protocol-v2=0\n\n', [good, eventThere], /feature-protocol-v2/],
        ['state=4\nfeature-protocol-v2=1\n\n', [good, eventThere], /state 3/],
        ['state=3\nfeature-protocol-v2=1\n', [good, eventThere], /not one message/],
        ['nonsense', [good, eventThere], /not one message/],
        [`${'a'.repeat(4000)}=1\n\n`, [good, eventThere], /not one message/],
      ];
      for (const [message, passed, why] of cases) {
        const frontend = await RawFrontend.connect(doorway.path);
        frontend.send(message, passed);
        await frontend.ended;
        assert.match(frontend.said, /state=6\n/, String(why));
        assert.match(frontend.said, why);
      }
      await until('nothing is left open', () => descriptors() <= open);
      for (const fd of own) closeSync(fd);
      listener.close();
      const client = await connect();
      assert.equal(responseCode(await client.transmit(getRandom())), 0);
      await client.close();
    });

    it('I-10: is harmed by no page, whatever a frontend writes and when', async () => {
      const honest = await connect();
      const ring = await FuzzedRing.open(doorway.path);
      await fc.assert(
        fc.asyncProperty(pageChanges(1, 30), setups, async (changes, setup) => {
          for (const one of changes) ring.change(one);
          await sendSetup(doorway.path, setup);
          assert.equal(responseCode(await honest.transmit(getRandom())), 0);
        }),
        { numRuns: 100 },
      );
      ring.close();
      await honest.close();
    });
  });

describe('worker: a ring whose worker is gone', () => {
  let run: KeptRun;
  let manager: MiniManager;
  let worker: WorkerProcess;
  let doorway: RingDoorway;

  beforeEach(async () => {
    run = new KeptRun();
    manager = new MiniManager();
    worker = await new WorkerProcess(manager).begin(run);
    doorway = await RingDoorway.open(run);
    doorway.leadTo(worker);
  });
  afterEach(async () => {
    await worker.kill();
    await doorway.close();
    manager.stop();
    run.close();
  });

  /** It was taken, ran, and waits for its save; another one was not looked at. */
  const twoUnderWay = async (): Promise<[Promise<Buffer>, Promise<Buffer>]> => {
    const [first, second] = [await RingClient.connect(doorway.path), await RingClient.connect(doorway.path)];
    manager.holdSaves = true;
    const saving = manager.next('SAVE');
    const taken = first.transmit(nvDefineCounter(INDEX));
    await saving;
    worker.child.kill('SIGSTOP');
    return [taken, second.transmit(nvReadCounter(INDEX))];
  };

  it('for good: a command that was taken is told as lost, and one that was not as not sent', async () => {
    const [taken, untaken] = await twoUnderWay();
    const outcomes = Promise.all([
      assert.rejects(taken, refused('lost')),
      assert.rejects(untaken, refused('closed')),
    ]);
    await worker.kill();
    await doorway.close();
    await outcomes;
    doorway = await RingDoorway.open(run);
  });

  it('with its state: what stands in a page is answered with TPM_RC_FAILURE', async () => {
    const [taken, untaken] = await twoUnderWay();
    await worker.kill();
    manager.cut();
    worker = new WorkerProcess(manager);
    doorway.leadTo(worker);
    await worker.beLost(run, doorway.visits);
    assert.deepEqual([responseCode(await taken), responseCode(await untaken)], [0x101, 0x101]);
    const late = await RingClient.connect(doorway.path);
    assert.equal(responseCode(await late.transmit(getRandom())), 0x101);
  });
});

/** Commands that change nothing leave no checkpoint: with the page half written, nothing else has their answer. */
describe('worker: a ring whose worker is killed over a command without checkpoint', () => {
  let directory: string;
  before(() => {
    directory = mkdtempSync(join(tmpdir(), 'vtpm-ring-kill-'));
  });
  after(() => rmSync(directory, { recursive: true, force: true }));

  for (const barrier of [
    'after-claim',
    'before-ring-answer',
    'after-ring-answer',
    'before-finish',
    'after-finish',
  ]) {
    it(`answers it once: ${barrier}`, async () => {
      const program = join(dirname(await buildFaultyWorker(directory, killAt(barrier, 2))), 'vtpmd.cjs');
      const run = new KeptRun();
      const manager = new MiniManager();
      const killed = await new WorkerProcess(manager, { program }).begin(run);
      const doorway = await RingDoorway.open(run);
      doorway.leadTo(killed);
      const client = await RingClient.connect(doorway.path);
      await client.transmit(getRandom());
      const answer = client.transmit(getRandom(20));
      await killed.exited;
      const next = new WorkerProcess(manager);
      doorway.leadTo(next);
      assert.equal((await next.goOn(run, doorway.visits)).type, 'serving');
      assert.equal((await answer).readUInt16BE(10), 20);
      assert.equal((await client.transmit(getRandom(21))).readUInt16BE(10), 21);
      await client.close();
      await next.kill();
      await killed.kill();
      await doorway.close();
      manager.stop();
      run.close();
    });
  }
});
