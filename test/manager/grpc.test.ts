import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { once } from 'node:events';
import { mkdtempSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { connect } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { status } from '@grpc/grpc-js';
import fc from 'fast-check';
import { createLogger } from 'vtpm-common';
import { ManagerError } from 'vtpm-manager';
import { DEFAULT_LIMITS } from 'vtpm-manager/grpc/limits';
import {
  type GrpcListener,
  serveToolstack,
  serveWorkers,
  type WorkerService,
  workerServiceDefinition,
} from 'vtpm-manager/grpc/server';
import { VtpmRegistry } from 'vtpm-manager/ownership/registry';
import { createAnchoredStore } from 'vtpm-manager/store/index';
import { createTrustStore, openTrustStore } from 'vtpm-manager/trust/trust-configuration';
import { decode, descriptor, EXCHANGE_PATH, encode, LOAD_PATH, MIGRATE_PATH, SAVE_PATH } from 'vtpm-proto';
import { MemoryStore } from '../support/memory-store.js';
import { anchorOptions, testKeys, unwatched } from '../support/test-keys.js';
import {
  loadRequest,
  type RefusedError,
  TestToolstack,
  testVtpm,
  WorkerClient,
} from '../support/worker-client.js';

const log = createLogger('test', { 'log-level': 'silent', 'log-format': 'json' });
/** TPM2_GetRandom(8), as a guest sends it. */
const TPM_COMMAND = Buffer.from('80010000000c0000017b0008', 'hex');

const noMigrations = () => {
  throw new ManagerError('locked', 'the manager is locked');
};

const refused = (code: status, reason?: string) => (error: RefusedError) => {
  assert.equal(error.code, code, error.message);
  assert.equal(error.reason, reason, error.message);
  return true;
};

describe('gRPC for workers', () => {
  const toolstack = new TestToolstack();
  const keys = testKeys();
  const managerId = keys.identity.publicKey;
  const clients: WorkerClient[] = [];
  let directory: string;
  let path: string;
  let disk: MemoryStore;
  let registry: VtpmRegistry;
  let current: () => WorkerService;
  let listener: GrpcListener;

  beforeEach(async () => {
    directory = mkdtempSync(join(tmpdir(), 'vtpm-grpc-'));
    path = join(directory, 'worker.sock');
    disk = new MemoryStore();
    const store = await createAnchoredStore(disk, anchorOptions(keys));
    await createTrustStore(keys, store, toolstack.key.publicKey, 1n);
    const trust = await openTrustStore(keys, store);
    await trust.allowImage(toolstack.imageDigest, '', 1n);
    registry = new VtpmRegistry({ keys, store, trust, ...unwatched });
    current = () => registry;
    listener = await serveWorkers(path, () => current(), log);
  });

  afterEach(async () => {
    for (const client of clients.splice(0)) client.close();
    await registry.close();
    await listener.close();
    rmSync(directory, { recursive: true });
  });

  function client(): WorkerClient {
    const made = new WorkerClient(path, managerId);
    clients.push(made);
    return made;
  }

  async function loaded(vtpm = testVtpm()) {
    const worker = client();
    const grant = await worker.load(toolstack.ticket(managerId, vtpm, worker.keys.publicKey));
    return { worker, vtpm, grant, session: await worker.session(vtpm, grant) };
  }

  it('serves Load and a Save stream', async () => {
    const { session } = await loaded();
    for (let generation = 1n; generation <= 20n; generation++) {
      const ack = await session.save({ permanent: randomBytes(4000) });
      assert.equal(ack.generation, generation);
      assert.equal(ack.committed, generation);
    }
    session.stream!.end();
    assert.equal(await session.stream!.ended, undefined);
  });

  it('acknowledges what a worker sends ahead in its order', async () => {
    const { session } = await loaded();
    for (let sequence = 1n; sequence <= 50n; sequence++) {
      session.stream!.send(session.saveFrame(sequence, { permanent: randomBytes(2000) }));
    }
    for (let sequence = 1n; sequence <= 50n; sequence++) {
      assert.equal((await session.ack()).committed, sequence);
    }
  });

  it('is a socket for its owner alone', () => {
    assert.equal(statSync(path).mode & 0o777, 0o600);
  });

  it('I-1 has the surface Load and Save, nothing else', async () => {
    assert.deepEqual(
      Object.values(workerServiceDefinition).map(({ path }) => path),
      [LOAD_PATH, SAVE_PATH],
    );
    const { nested } = descriptor as {
      nested: { vtpm: { nested: { v1: { nested: Record<string, object> } } } };
    };
    const methods = Object.entries(nested.vtpm.nested.v1.nested).flatMap(([service, definition]) =>
      Object.keys((definition as { methods?: object }).methods ?? {}).map((name) => `${service}/${name}`),
    );
    assert.deepEqual(methods.sort(), [
      'MigrationPeer/Exchange',
      'VtpmManager/Load',
      'VtpmManager/Save',
      'VtpmMigration/Migrate',
    ]);
  });

  it('I-1 answers UNIMPLEMENTED to every other method, a TPM command included', async () => {
    const { worker, vtpm } = await loaded();
    for (const method of [
      '/vtpm.v1.VtpmManager/TpmCommand',
      '/vtpm.v1.VtpmManager/Transmit',
      '/vtpm.v1.VtpmManager/load',
      '/vtpm.v1.VtpmMigration/Migrate',
      '/vtpm.v1.MigrationPeer/Exchange',
      '/grpc.reflection.v1.ServerReflection/ServerReflectionInfo',
      '/',
    ]) {
      await assert.rejects(worker.call(method, TPM_COMMAND), refused(status.UNIMPLEMENTED));
    }
    await assert.rejects(
      worker.call(LOAD_PATH, TPM_COMMAND),
      refused(status.INVALID_ARGUMENT, 'bad-request'),
    );
    assert.equal((await registry.view(vtpm.id)).header.epoch, 1n);
  });

  it('I-1 ends a connection that speaks TPM commands instead of HTTP/2, and nobody else notices', async () => {
    const { session } = await loaded();
    for (const bytes of [TPM_COMMAND, randomBytes(5000)]) {
      const socket = connect(path);
      await once(socket, 'connect');
      const received: Buffer[] = [];
      socket.on('data', (chunk: Buffer) => received.push(chunk));
      socket.on('error', () => undefined);
      socket.write(bytes);
      await once(socket, 'close');
      // What comes back is HTTP/2's own, never a TPM response (tag 0x8001).
      assert.notEqual(Buffer.concat(received).subarray(0, 2).toString('hex'), '8001');
    }
    assert.equal((await session.save({ permanent: Buffer.from('P') })).generation, 1n);
  });

  it('I-2 takes from a worker that waits for a vTPM nothing but one Load, with its ticket', async () => {
    const hasReason = (reason: string) => (error: RefusedError) => error.reason === reason;
    const { worker, vtpm, grant, session } = await loaded();
    const idle = client();
    const other = testVtpm();
    // What it may have seen of others: their ticket, which is not for its key, and their frames.
    await assert.rejects(
      idle.load(toolstack.ticket(managerId, other, randomBytes(32))),
      hasReason('wrong-worker'),
    );
    await assert.rejects(idle.call('/vtpm.v1.VtpmManager/Other', TPM_COMMAND), refused(status.UNIMPLEMENTED));
    const early = idle.openStream();
    early.send(session.saveFrame(1n, { permanent: randomBytes(100) }));
    assert.equal(((await early.ended) as RefusedError).reason, 'bad-request');
    await assert.rejects(
      idle.session(vtpm, { ...grant, sessionKey: randomBytes(32) }),
      hasReason('wrong-worker'),
    );
    const own = await idle.load(toolstack.ticket(managerId, other, idle.keys.publicKey));
    assert.equal(own.manufacture, true, 'none of that costs it its own vTPM');
    await assert.rejects(
      worker.load(toolstack.ticket(managerId, testVtpm(), worker.keys.publicKey)),
      hasReason('bad-request'),
    );
    assert.equal((await session.save({ permanent: Buffer.from('P') })).generation, 1n);
  });

  it('I-1 gives the toolstack socket Migrate and nothing else', async () => {
    const other = join(directory, 'toolstack.sock');
    const toolstackListener = await serveToolstack(other, noMigrations, log);
    const caller = new WorkerClient(other, managerId);
    await assert.rejects(
      caller.call(MIGRATE_PATH, Buffer.alloc(0)),
      refused(status.INVALID_ARGUMENT, 'bad-request'),
    );
    for (const method of [LOAD_PATH, SAVE_PATH, EXCHANGE_PATH]) {
      await assert.rejects(caller.call(method, Buffer.alloc(0)), refused(status.UNIMPLEMENTED));
    }
    caller.close();
    await toolstackListener.close();
  });

  it('says why in the status, the message and the trailer', async () => {
    const worker = client();
    const vtpm = testVtpm();
    const ticket = (changes: object) =>
      worker.load(toolstack.ticket(managerId, vtpm, worker.keys.publicKey, changes));
    await assert.rejects(ticket({ expectedEpoch: 7n }), refused(status.FAILED_PRECONDITION, 'stale-epoch'));
    await assert.rejects(ticket({ imageDigest: randomBytes(32) }), (error: RefusedError) => {
      assert.match(error.message, /image-not-allowed: the worker image [0-9a-f]{64} is not allowed/);
      return refused(status.PERMISSION_DENIED, 'image-not-allowed')(error);
    });
    current = () => {
      throw new ManagerError('locked', 'the platform policy refuses');
    };
    const next = client();
    await assert.rejects(
      next.load(toolstack.ticket(managerId, vtpm, next.keys.publicKey)),
      refused(status.UNAVAILABLE, 'locked'),
    );
    const stream = worker.openStream();
    stream.sendBytes(encode('WorkerFrame', frame()));
    assert.ok(refused(status.UNAVAILABLE, 'locked')((await stream.ended)!));
  });

  it('tells a failure of its own without what it was', async () => {
    disk.beforeCommit = () => {
      throw new Error('secret detail');
    };
    const worker = client();
    const load = worker.load(toolstack.ticket(managerId, testVtpm(), worker.keys.publicKey));
    await assert.rejects(load, (error: RefusedError) => {
      assert.equal(error.reason, 'internal');
      return true;
    });
  });

  it('ends a stream with a malformed frame, that stream only', async () => {
    const { session, worker, vtpm, grant } = await loaded();
    const { session: neighbour } = await loaded();
    session.stream!.sendBytes(Buffer.from('ffffffff', 'hex'));
    assert.ok(refused(status.INVALID_ARGUMENT, 'bad-request')((await session.stream!.ended)!));
    // The same connection opens the session's next stream.
    assert.equal((await session.connect(worker.openStream())).committed, 0n);
    assert.equal((await session.save({ permanent: Buffer.from('P') })).generation, 1n);
    assert.equal((await neighbour.save({ permanent: Buffer.from('P') })).generation, 1n);
    assert.equal((await registry.view(vtpm.id)).header.epoch, grant.epoch);
  });

  it('answers any bytes with a defined error', async () => {
    await fc.assert(
      fc.asyncProperty(fc.uint8Array({ maxLength: 600 }), async (bytes) => {
        await assert.rejects(client().call(LOAD_PATH, Buffer.from(bytes)), (error: RefusedError) => {
          assert.ok(error.reason, error.message);
          return true;
        });
        // The Load costs its connection.
        const stream = client().openStream();
        stream.sendBytes(Buffer.from(bytes));
        assert.ok((await stream.ended)?.reason);
      }),
      { numRuns: 50 },
    );
  });

  it('refuses messages over the limit by name, and far over it without reading them', async () => {
    const { session, worker } = await loaded();
    const tooLarge = Buffer.alloc(512 * 1024 + 1);
    session.stream!.sendBytes(tooLarge);
    assert.ok(refused(status.INVALID_ARGUMENT, 'too-large')((await session.stream!.ended)!));
    await assert.rejects(client().call(LOAD_PATH, tooLarge), refused(status.INVALID_ARGUMENT, 'too-large'));
    await assert.rejects(
      client().call(LOAD_PATH, Buffer.alloc(2 * 1024 * 1024)),
      refused(status.RESOURCE_EXHAUSTED),
    );
    await session.connect(worker.openStream());
  });

  it('I-8 Loads without a good ticket take nothing from what all workers share', async () => {
    await listener.close();
    const rate = { burst: 1, perSecond: 0.001 };
    listener = await serveWorkers(path, () => current(), log, { ...DEFAULT_LIMITS, loadsPerUid: rate });
    const stranger = new TestToolstack();
    for (let count = 0; count < 3; count++) {
      const hostile = client();
      const good = toolstack.ticket(managerId, testVtpm(), hostile.keys.publicKey);
      const forged = { ...good, signature: randomBytes(64) };
      await assert.rejects(hostile.load(forged), refused(status.PERMISSION_DENIED, 'ticket-forged'));
      const other = client();
      const unknown = stranger.ticket(managerId, testVtpm(), other.keys.publicKey);
      await assert.rejects(other.load(unknown), refused(status.PERMISSION_DENIED, 'unknown-toolstack-key'));
      await assert.rejects(
        client().call(LOAD_PATH, Buffer.alloc(100, 0xff)),
        refused(status.INVALID_ARGUMENT, 'bad-request'),
      );
    }
    await loaded();
    await assert.rejects(loaded(), refused(status.RESOURCE_EXHAUSTED, 'rate-limited'));
  });

  it('I-2 binds a connection to the session it loaded', async () => {
    const [own, other] = [await loaded(), await loaded()];
    // Even the right key does not help on somebody else's connection.
    const stream = own.worker.openStream();
    stream.send(other.session.firstFrame());
    assert.ok(refused(status.FAILED_PRECONDITION, 'wrong-worker')((await stream.ended)!));
    const vtpm = testVtpm();
    const ticket = toolstack.ticket(managerId, vtpm, own.worker.keys.publicKey);
    await assert.rejects(own.worker.load(ticket), refused(status.INVALID_ARGUMENT, 'bad-request'));
    // Positive control: on a connection of its own the same ticket is good.
    const fresh = client();
    const answer = await fresh.call(
      LOAD_PATH,
      encode('LoadRequest', loadRequest(managerId, ticket, own.worker.keys)),
    );
    decode('LoadResponse', answer);
    await other.session.connect(other.worker.openStream());
  });

  it('I-2 gives a ticket that was seen on the way to nobody else', async () => {
    const owner = client();
    const ticket = toolstack.ticket(managerId, testVtpm(), owner.keys.publicKey);
    const thief = client();
    await assert.rejects(thief.load(ticket), refused(status.FAILED_PRECONDITION, 'wrong-worker'));
    const request = loadRequest(managerId, ticket, owner.keys);
    await owner.send(request);
    // The very bytes again, from another connection.
    await assert.rejects(thief.send(request), refused(status.FAILED_PRECONDITION, 'stale-epoch'));
  });

  it('fences the worker that lost the vTPM over its open stream', async () => {
    const { session, vtpm } = await loaded();
    await session.save({ permanent: Buffer.from('P1') });
    const next = client();
    await next.load(
      toolstack.ticket(managerId, vtpm, next.keys.publicKey, { expectedEpoch: 1n, verbs: ['COLD'] }),
    );
    const fenced = await session.stream!.next();
    assert.equal(fenced.type, 'FENCED');
    session.cipher.openManager(fenced);
    assert.ok(refused(status.ABORTED, 'fenced')((await session.stream!.ended)!));
  });

  it('notices a worker that is gone', async () => {
    const { session, vtpm } = await loaded();
    const lost = new Promise<void>((resolve) => {
      registry.events.subscribe(({ type }) => type === 'link-lost' && resolve());
    });
    session.stream!.cancel();
    await lost;
    assert.equal((await registry.view(vtpm.id)).isConnected, false);
  });

  it('a worker that does not read holds up nobody else', async () => {
    const hostile = await loaded();
    const { session } = await loaded();
    hostile.session.stream!.pause();
    for (let sequence = 1n; sequence <= 200n; sequence++) {
      hostile.session.stream!.send(hostile.session.saveFrame(sequence, { permanent: Buffer.alloc(64) }));
    }
    assert.equal((await session.save({ permanent: Buffer.from('P') })).generation, 1n);
    // Not even the next owner of its own vTPM.
    const { header } = await registry.view(hostile.vtpm.id);
    const next = client();
    await next.load(
      toolstack.ticket(managerId, hostile.vtpm, next.keys.publicKey, {
        expectedEpoch: header.epoch,
        verbs: ['MANUFACTURE', 'COLD'],
      }),
    );
  });

  it('replaces a socket that lies there dead, but no file', async () => {
    const other = join(directory, 'other.sock');
    writeFileSync(other, 'something else');
    await assert.rejects(serveToolstack(other, noMigrations, log), /exists and is not a socket/);
    rmSync(other);
    const first = await serveToolstack(other, noMigrations, log);
    const second = await serveToolstack(other, noMigrations, log);
    await second.close();
    await first.close();
  });
});

function frame() {
  const empty = new Uint8Array(0);
  return {
    type: 'HELLO' as const,
    vtpmUuid: Buffer.alloc(16),
    sessionId: Buffer.alloc(16),
    sequence: 1n,
    nonce: empty,
    sealed: empty,
  };
}
