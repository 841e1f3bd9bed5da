import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { once } from 'node:events';
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { type ClientHttp2Session, connect as connectHttp2 } from 'node:http2';
import { connect, type Socket } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { status } from '@grpc/grpc-js';
import { createLogger } from 'vtpm-common';
import { ManagerError } from 'vtpm-manager';
import { DEFAULT_LIMITS, type Limits } from 'vtpm-manager/grpc/limits';
import { type GrpcListener, serveWorkers, type WorkerService } from 'vtpm-manager/grpc/server';
import { encode, frameMessage, LOAD_PATH, SAVE_PATH } from 'vtpm-proto';
import { badCalls, flood, LARGEST_SAVE, SMALLEST_SAVE, stall } from '../support/hostile-worker.js';
import { ManagerInstallation } from '../support/manager-process.js';
import { until } from '../support/until.js';
import { type RefusedError, type TestSession, testVtpm, WorkerClient } from '../support/worker-client.js';

const log = createLogger('test', { 'log-level': 'silent', 'log-format': 'json' });
const MIB = 1024 * 1024;
/** RFC 9113 section 6.7: a frame header and 8 bytes. */
const PING_BYTES = 17;

describe('I-8 I-10 hostile neighbours', () => {
  let manager: ManagerInstallation;
  let managerId: string;
  const open: WorkerClient[] = [];

  before(async () => {
    manager = new ManagerInstallation();
    managerId = String((await manager.init('embedded')).managerId);
    await manager.start();
    const image = { digest: manager.toolstack.imageDigest.toString('hex'), note: 'test' };
    await manager.admin('POST', '/images', image);
  });
  afterEach(() => {
    for (const client of open.splice(0)) client.close();
  });
  after(() => manager.remove());

  function client(): WorkerClient {
    const made = manager.worker(managerId);
    open.push(made);
    return made;
  }

  async function serving(worker = client()): Promise<TestSession> {
    const vtpm = testVtpm();
    const ticket = manager.toolstack.ticket(worker.managerId, vtpm, worker.keys.publicKey);
    return await worker.session(vtpm, await worker.load(ticket));
  }

  const residentMiB = (): number => {
    const text = readFileSync(`/proc/${manager.child!.pid}/status`, 'utf8');
    return Number(/VmRSS:\s+(\d+) kB/.exec(text)![1]) / 1024;
  };

  /** The victim saves, over and over, while `hostile` does what it does; every save is acknowledged. */
  async function withVictim(hostile: (signal: AbortSignal) => Promise<unknown>[]): Promise<void> {
    const victim = await serving();
    const before = residentMiB();
    const ending = new AbortController();
    const running = hostile(ending.signal);
    let most = 0;
    for (let generation = 1n; generation <= 100n; generation++) {
      const ack = await victim.save({ permanent: randomBytes(10 * 1024) });
      assert.equal(ack.generation, generation);
      assert.equal(ack.committed, generation);
      most = Math.max(most, residentMiB());
    }
    ending.abort();
    await Promise.all(running);
    // Eight of them send 16 MiB and more each: what is read ahead and worked on is a fraction of it.
    assert.ok(most - before < 128, `the manager grew from ${before} MiB to ${most} MiB`);
  }

  it('I-8 that save without pause, large and small', async () => {
    const hostile = await Promise.all(Array.from({ length: 8 }, () => serving()));
    await withVictim((signal) =>
      hostile.map((session, at) => flood(session, at % 2 ? LARGEST_SAVE : SMALLEST_SAVE, signal, 16)),
    );
    // They are held up, not cut off: what they saved is acknowledged.
    for (const session of hostile) assert.equal(session.stream!.isOver, false);
  });

  it('I-8 that never read what they are answered', async () => {
    const hostile = await Promise.all(Array.from({ length: 8 }, () => serving()));
    await withVictim(() => hostile.map((session) => stall(session, LARGEST_SAVE, 40)));
  });

  it('I-10 that send malformed and oversized Saves: named errors, and no more than their calls', async () => {
    const reasons = new Set<string | undefined>();
    await withVictim(() =>
      [Buffer.from('no frame'), Buffer.alloc(512 * 1024 + 1)].map(async (bytes) => {
        const hostile = client();
        for (let call = 0; call < 2 * DEFAULT_LIMITS.callsPerConnection; call++) {
          const stream = hostile.openStream();
          stream.sendBytes(bytes);
          const refused = await stream.ended;
          if (call <= DEFAULT_LIMITS.callsPerConnection) reasons.add(refused?.reason);
        }
      }),
    );
    assert.deepEqual([...reasons].sort(), ['bad-request', 'rate-limited', 'too-large']);
  });

  it('I-10 that call Load with nonsense, on one connection after the other', async () => {
    await withVictim((signal) => Array.from({ length: 4 }, () => badCalls(() => client(), signal)));
  });

  it('I-10 that call what there is not, without end: the connection is closed', async () => {
    const socket = connect(manager.paths.workerSocket);
    const closed = new Promise((resolve) => socket.once('close', resolve));
    const session = http2On(socket);
    await withVictim(() => [
      (async () => {
        let answered = 0;
        while (!session.destroyed) {
          const request = session.request({
            ':method': 'POST',
            ':path': `/no/${'x'.repeat(2000)}${answered}`,
          });
          request.on('error', () => undefined);
          request.resume();
          await new Promise((resolve) => request.once('close', resolve));
          answered++;
        }
        assert.ok(answered > 0, 'positive control: at first they were answered');
      })(),
    ]);
    await closed;
  });

  it('I-8 a worker that saves for long is not taken for one', async () => {
    const honest = await serving();
    for (let save = 1; save <= 1500; save++) await honest.save(SMALLEST_SAVE);
    assert.equal((await honest.save(LARGEST_SAVE)).committed, 1501n);
  });
});

describe('I-10 what the manager takes of a connection', () => {
  let directory: string;
  let path: string;
  let listener: GrpcListener;
  const sockets: Socket[] = [];

  beforeEach(() => {
    directory = mkdtempSync(join(tmpdir(), 'vtpm-hostile-'));
    path = join(directory, 'worker.sock');
  });
  afterEach(async () => {
    for (const socket of sockets.splice(0)) socket.destroy();
    await listener.close();
    rmSync(directory, { recursive: true });
  });

  async function serve(service: Partial<WorkerService>, limits: Partial<Limits> = {}): Promise<void> {
    const refused = () => Promise.reject(new Error('not asked for'));
    const whole = { load: refused, attach: refused, ...service };
    listener = await serveWorkers(path, () => whole, log, { ...DEFAULT_LIMITS, ...limits });
  }

  async function connected(): Promise<Socket> {
    const socket = connect(path);
    sockets.push(socket);
    socket.on('error', () => undefined);
    await once(socket, 'connect');
    return socket;
  }

  it('I-10 what a worker sends ahead of a Save that is not done waits in its own socket', async () => {
    let taken = 0;
    await serve({
      attach: async () => ({
        receive: () => {
          taken += 1;
          return new Promise(() => undefined);
        },
        detach: () => undefined,
      }),
    });
    const socket = await connected();
    const headers = {
      ':method': 'POST',
      ':path': SAVE_PATH,
      'content-type': 'application/grpc',
      te: 'trailers',
    };
    const session = http2On(socket);
    const stream = session.request(headers);
    stream.on('error', () => undefined);
    const empty = new Uint8Array(0);
    const frame = { type: 'SAVE', vtpmUuid: empty, sessionId: empty, sequence: 1n, nonce: empty } as const;
    const message = frameMessage(encode('WorkerFrame', { ...frame, sealed: Buffer.alloc(400 * 1024) }));
    for (let count = 0; count < 40; count++) stream.write(message);
    await until('the first frame', () => taken === 1);
    // A ping goes past what waits: when nothing has moved between three of them, nothing will.
    for (let still = 0, written = -1; still < 3; ) {
      await new Promise<void>((resolve, reject) => {
        session.ping((error) => (error ? reject(error) : resolve()));
      });
      const now = socket.bytesWritten - PING_BYTES;
      still = now === written ? still + 1 : 0;
      written = socket.bytesWritten;
    }
    const written = socket.bytesWritten;
    assert.equal(taken, 1);
    assert.ok(written > message.length, 'positive control: it was read at first');
    assert.ok(
      written < 5 * message.length,
      `${(written / MIB).toFixed(1)} MiB were taken of ${(40 * message.length) / MIB}`,
    );
  });

  it('I-10 links that wait for a vTPM are bounded: those that wait or have a session stay', async () => {
    await serve(
      {
        load: async (_, connection) => {
          connection.session = { vtpmUuid: Buffer.alloc(16), sessionId: Buffer.alloc(16) };
          return { nonce: Buffer.alloc(24), box: Buffer.alloc(16) };
        },
      },
      { waitingPerUid: 3 },
    );
    const request = encode('LoadRequest', { nonce: Buffer.alloc(24), box: Buffer.alloc(32) });
    const loaded = Array.from({ length: 5 }, () => new WorkerClient(path, Buffer.alloc(32)));
    // Positive control: as many as it likes, one after the other, where each gets its session.
    for (const client of loaded) await client.call(LOAD_PATH, request);
    const waiting = [await connected(), await connected(), await connected()];
    const sessions = waiting.map(http2On);
    const ping = (session: ClientHttp2Session): Promise<void> =>
      new Promise((resolve, reject) => {
        session.ping((error) => (error ? reject(error) : resolve()));
      });
    for (const session of sessions) await ping(session);
    for (let more = 0; more < 50; more++) await once(await connected(), 'close');
    for (const session of sessions) await ping(session);
    for (const client of loaded) await client.call(LOAD_PATH, request);
    waiting[0]!.destroy();
    await until('a place is free', async () => {
      const next = new WorkerClient(path, Buffer.alloc(32));
      const isIn = await next.call(LOAD_PATH, request).then(
        () => true,
        () => false,
      );
      next.close();
      return isIn;
    });
    for (const client of loaded) client.close();
  });

  it('I-10 a Load that nobody signed who may costs its connection, another refusal does not', async () => {
    let code: 'ticket-forged' | 'stale-epoch' = 'stale-epoch';
    await serve({ load: () => Promise.reject(new ManagerError(code, 'no')) });
    const socket = await connected();
    const session = http2On(socket);
    const load = async (): Promise<unknown> => {
      const type = { 'content-type': 'application/grpc', te: 'trailers' };
      const call = session.request({ ':method': 'POST', ':path': LOAD_PATH, ...type });
      call.end(frameMessage(encode('LoadRequest', { nonce: Buffer.alloc(24), box: Buffer.alloc(32) })));
      call.resume();
      const [headers] = (await Promise.race([once(call, 'trailers'), once(call, 'response')])) as [
        Record<string, unknown>,
      ];
      return headers['vtpm-reason'] ?? ((await once(call, 'trailers')) as [typeof headers])[0]['vtpm-reason'];
    };
    assert.equal(await load(), 'stale-epoch');
    code = 'ticket-forged';
    const closed = once(socket, 'close');
    assert.equal(await load(), 'ticket-forged', 'it is told first, on the same connection');
    await closed;
  });

  it('I-10 connections that are open at once are bounded: those that are there stay', async () => {
    await serve(
      { load: async () => ({ nonce: Buffer.alloc(24), box: Buffer.alloc(16) }) },
      { openConnections: 2 },
    );
    const first = new WorkerClient(path, Buffer.alloc(32));
    const request = encode('LoadRequest', { nonce: Buffer.alloc(24), box: Buffer.alloc(32) });
    await first.call(LOAD_PATH, request);
    await connected();
    const third = new WorkerClient(path, Buffer.alloc(32));
    await assert.rejects(third.call(LOAD_PATH, request), (error: RefusedError) => {
      assert.equal(error.code, status.UNAVAILABLE);
      return true;
    });
    await first.call(LOAD_PATH, request);
    first.close();
    third.close();
  });
});

function http2On(socket: Socket): ClientHttp2Session {
  const session = connectHttp2('http://localhost', { createConnection: () => socket });
  session.on('error', () => undefined);
  // The manager closes it without a word: both ends of the same connection may say so.
  socket.on('error', () => undefined);
  return session;
}
