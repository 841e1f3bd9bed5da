import assert from 'node:assert/strict';
import { once } from 'node:events';
import { mkdtempSync, rmSync } from 'node:fs';
import { connect, createServer, type Socket } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { decode, encode, LOAD_PATH, MessageReader, type WorkerFrame } from 'vtpm-proto';
import { until } from '../support/until.js';
import { loadRequest, WorkerClient } from '../support/worker-client.js';
import { type LoadedWorker, refusedBecause, Target } from './target.js';

/** Between a worker and the manager: hands everything on, and keeps what the worker sent. */
class Wiretap {
  readonly #directory = mkdtempSync(join(tmpdir(), 'vtpm-wire-'));
  readonly path = join(this.#directory, 'w.sock');
  readonly #sent: Buffer[] = [];
  readonly #open = new Set<Socket>();
  readonly #server;

  constructor(target: string) {
    this.#server = createServer((worker) => {
      const manager = connect(target);
      for (const socket of [worker, manager]) {
        this.#open.add(socket);
        socket.on('error', () => socket.destroy());
        socket.on('close', () => {
          worker.destroy();
          manager.destroy();
        });
      }
      worker.on('data', (bytes: Buffer) => this.#sent.push(bytes));
      worker.pipe(manager);
      manager.pipe(worker);
    }).listen(this.path);
  }

  /** Every byte of the worker's, in order. */
  get sent(): Buffer {
    return Buffer.concat(this.#sent);
  }

  close(): void {
    for (const socket of this.#open) socket.destroy();
    this.#server.close();
    rmSync(this.#directory, { recursive: true });
  }
}

interface Http2Frame {
  readonly stream: number;
  readonly type: number;
  readonly flags: number;
  readonly payload: Buffer;
}

// RFC 9113, sections 3.4, 6.1, 6.2 and 6.4
const PREFACE_BYTES = 24;
const DATA = 0;
const HEADERS = 1;
const RST_STREAM = 3;
const END_STREAM = 1;

/** Whole HTTP/2 frames (RFC 9113, section 4.1). */
function* framesOf(bytes: Buffer): Generator<Http2Frame> {
  for (let at = 0; at + 9 <= bytes.length; ) {
    const end = at + 9 + bytes.readUIntBE(at, 3);
    if (end > bytes.length) return;
    const [type, flags, stream] = [
      bytes.readUInt8(at + 3),
      bytes.readUInt8(at + 4),
      bytes.readUInt32BE(at + 5),
    ];
    yield { stream, type, flags, payload: bytes.subarray(at + 9, end) };
    at = end;
  }
}

/** The messages that a recorded connection carried, stream by stream. */
function messagesOf(recorded: Buffer): Buffer[][] {
  const streams = new Map<number, { reader: MessageReader; messages: Buffer[] }>();
  for (const { stream, type, payload } of framesOf(recorded.subarray(PREFACE_BYTES))) {
    if (type !== DATA) continue;
    const found = streams.get(stream) ?? { reader: new MessageReader(), messages: [] };
    streams.set(stream, found);
    found.messages.push(...found.reader.push(payload));
  }
  return [...streams.values()].map(({ messages }) => messages);
}

/** Streams that the other side has ended. */
function endedStreams(answer: Buffer): number {
  const isEnd = ({ type, flags }: Http2Frame): boolean =>
    type === RST_STREAM || ((type === HEADERS || type === DATA) && (flags & END_STREAM) !== 0);
  return new Set([...framesOf(answer)].filter(isEnd).map(({ stream }) => stream)).size;
}

describe('attack: the recorded conversation of a worker is replayed', () => {
  let target: Target;
  let worker: LoadedWorker;
  let wiretap: Wiretap;
  let link: WorkerClient;
  let load: Buffer;
  let frames: Buffer[];

  before(async () => {
    target = await Target.create();
  });
  beforeEach(async () => {
    await target.starts();
    wiretap = new Wiretap(target.manager.paths.workerSocket);
    link = new WorkerClient(wiretap.path, Buffer.from(target.managerId, 'hex'));
    worker = await target.load(undefined, 0n, link);
    for (const text of ['1', '2']) await worker.session.save({ permanent: Buffer.from(text) });
    const [first, second] = messagesOf(wiretap.sent);
    assert.equal(first?.length, 1);
    load = first[0]!;
    frames = second!;
    assert.deepEqual(
      frames.map((bytes) => decode('WorkerFrame', bytes).type),
      ['HELLO', 'SAVE', 'SAVE'],
    );
  });
  afterEach(async () => {
    link.close();
    wiretap.close();
    await target.manager.stop('SIGKILL');
  });
  after(async () => {
    await target?.destroy();
    await target?.tpm?.stop();
  });

  /** What it must not change: what the vTPM has, whose it is, and who is connected. */
  async function state() {
    const { generation, epoch, savedAt, session } = await target.view(worker.vtpm);
    return { generation, epoch, savedAt, session };
  }

  /** The recorded bytes as they were, on a connection of their own, until Load and Save have been refused. */
  async function replayBytes(...reasons: string[]): Promise<void> {
    const { manager } = target;
    const logged = manager.stderr.length;
    const socket = connect(manager.paths.workerSocket);
    const closed = once(socket, 'close');
    const answer: Buffer[] = [];
    socket.on('data', (bytes: Buffer) => {
      answer.push(bytes);
      if (endedStreams(Buffer.concat(answer)) === 2) socket.destroy();
    });
    socket.write(wiretap.sent);
    await closed;
    for (const reason of reasons) {
      await until(`${reason} is in the log`, () =>
        manager.stderr.slice(logged).includes(`"reason":"${reason}"`),
      );
    }
  }

  async function replayLoad(reason: string): Promise<void> {
    const thief = target.manager.worker(target.managerId);
    await assert.rejects(thief.call(LOAD_PATH, load), refusedBecause(reason));
    thief.close();
  }

  async function replayFrames(replayed: readonly Buffer[], reason: string, message = /./): Promise<void> {
    const thief = target.manager.worker(target.managerId);
    const stream = thief.openStream();
    for (const bytes of replayed) stream.sendBytes(bytes);
    const refusal = await stream.ended;
    assert.ok(refusal, 'the stream was refused');
    refusedBecause(reason, message)(refusal);
    thief.close();
  }

  /** The worker goes on as if nothing had happened. */
  async function goesOn(generation: bigint): Promise<void> {
    const ack = await worker.session.save({ permanent: Buffer.from('next') });
    assert.equal(ack.generation, generation);
  }

  it('I-2 I-3 while the worker is connected: refused by name, and nothing is changed', async () => {
    const before = await state();
    await replayBytes('stale-epoch', 'wrong-worker');
    await replayLoad('stale-epoch');
    await replayFrames(frames, 'wrong-worker', /HELLO of link 1 was used before/);
    await replayFrames(frames.slice(1), 'bad-request');
    assert.deepEqual(await state(), before);
    await goesOn(3n);
  });

  it('I-2 I-3 after a restart of the manager, before the worker is back', async () => {
    const before = await state();
    await target.manager.stop('SIGKILL');
    await target.starts();
    // The frames first: of a link that was let in the manager knows the number.
    await replayLoad('stale-epoch');
    await replayFrames(frames, 'wrong-worker', /HELLO of link 1 was used before/);
    await replayBytes('stale-epoch', 'wrong-worker');
    await replayFrames(frames.slice(1), 'bad-request');
    const after = await state();
    assert.deepEqual({ ...after, session: undefined }, { ...before, session: undefined });
    assert.deepEqual(after.session, { ...(before.session as object), connected: false });
    const again = target.manager.worker(target.managerId);
    await worker.session.connect(again.openStream());
    await goesOn(3n);
    again.close();
  });

  it('I-2 I-3 after a restart: a recorded RESUME that knows as much as the record does', async () => {
    // The worker resumes, saves nothing, and the manager is started anew: no save stands between the two.
    const second = new WorkerClient(wiretap.path, Buffer.from(target.managerId, 'hex'));
    const stream = second.openStream();
    await worker.session.connect(stream);
    const resume = messagesOf(wiretap.sent.subarray(wiretap.sent.lastIndexOf('PRI * HTTP/2.0')))
      .flat()
      .find((bytes) => decode('WorkerFrame', bytes).type === 'RESUME');
    assert.ok(resume);
    const before = await state();
    await target.manager.stop('SIGKILL');
    second.close();
    await target.starts();
    await replayFrames(
      [resume, frames[1]!],
      'wrong-worker',
      /save 1 is older than save 2, on a link that brought nothing new/,
    );
    const again = target.manager.worker(target.managerId);
    await worker.session.connect(again.openStream());
    assert.deepEqual(await state(), before);
    await goesOn(3n);
    again.close();
  });

  it('I-2 I-3 after another worker has loaded the vTPM', async () => {
    const next = await target.load(worker.vtpm, 1n);
    assert.equal(next.permanent, '2');
    await next.session.save({ permanent: Buffer.from('3') });
    const before = await state();
    await replayBytes('stale-epoch', 'fenced');
    await replayLoad('stale-epoch');
    await replayFrames(frames, 'fenced');
    await replayFrames(frames.slice(1), 'bad-request');
    assert.deepEqual(await state(), before);
    assert.equal((await next.session.save({ permanent: Buffer.from('4') })).generation, 4n);
    await next.close();
  });

  it('I-2 the recorded Load under another key, and the frames of one vTPM for another', async () => {
    const { ticket } = decode('LoadRequest', load);
    assert.ok(ticket);
    const other = await target.load();
    const before = await state();
    const thief = target.manager.worker(target.managerId);
    const forged = loadRequest(thief.managerId, ticket, thief.keys);
    await assert.rejects(thief.send(forged), refusedBecause('wrong-worker'));
    thief.close();
    const hello: WorkerFrame = decode('WorkerFrame', frames[0]!);
    await replayFrames([encode('WorkerFrame', { ...hello, vtpmUuid: other.vtpm.uuid })], 'fenced');
    assert.deepEqual(await state(), before);
    await other.session.save({ permanent: Buffer.from('other') });
    await other.close();
    await goesOn(3n);
  });

  it('positive control: the same bytes on their way for the first time are taken', async () => {
    const vtpm = worker.vtpm;
    const fresh = target.manager.worker(target.managerId);
    const ticket = target.manager.toolstack.ticket(fresh.managerId, vtpm, fresh.keys.publicKey, {
      expectedEpoch: 1n,
      verbs: ['COLD'],
    });
    const grant = await fresh.load(ticket);
    assert.equal(Buffer.from(grant.permanent).toString(), '2');
    const session = await fresh.session(vtpm, grant);
    const frame = encode('WorkerFrame', session.saveFrame(1n, { permanent: Buffer.from('3') }));
    session.stream!.sendBytes(frame);
    assert.equal((await session.ack()).generation, 3n);
    // And once more on the same link: acknowledged again, and counted once.
    session.stream!.sendBytes(frame);
    assert.equal((await session.ack()).generation, 3n);
    assert.equal((await state()).generation, 3);
    fresh.close();
  });
});
