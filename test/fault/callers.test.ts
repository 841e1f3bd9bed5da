import assert from 'node:assert/strict';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { status } from '@grpc/grpc-js';
import { createLogger } from 'vtpm-common';
import { DEFAULT_LIMITS, type Limits } from 'vtpm-manager/grpc/limits';
import { type GrpcListener, serveWorkers, type WorkerService } from 'vtpm-manager/grpc/server';
import { encode, LOAD_PATH } from 'vtpm-proto';
import { ManagerInstallation } from '../support/manager-process.js';
import { type RefusedError, type TestSession, testVtpm, WorkerClient } from '../support/worker-client.js';

const log = createLogger('test', { 'log-level': 'silent', 'log-format': 'json' });
const LOAD = encode('LoadRequest', { nonce: Buffer.alloc(24), box: Buffer.alloc(32) });

describe('I-10 callers that ask too much of the manager', () => {
  describe('a worker with its one connection', () => {
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

    async function serving(): Promise<TestSession> {
      const worker = client();
      const vtpm = testVtpm();
      const ticket = manager.toolstack.ticket(worker.managerId, vtpm, worker.keys.publicKey);
      return await worker.session(vtpm, await worker.load(ticket));
    }

    it('I-10 calls without end are refused by name, then the connection is closed; nobody else notices', async () => {
      const neighbour = await serving();
      const hostile = client();
      const reasons: (string | undefined)[] = [];
      let closed = 0;
      const nonsense = async (): Promise<RefusedError | undefined> => {
        const stream = hostile.openStream();
        stream.sendBytes(Buffer.from('no frame'));
        return await stream.ended;
      };
      for (let call = 1; call <= 2 * DEFAULT_LIMITS.callsPerConnection; call++) {
        reasons.push((await nonsense())?.reason);
      }
      const { callsPerConnection } = DEFAULT_LIMITS;
      assert.ok(reasons.slice(0, callsPerConnection).every((reason) => reason === 'bad-request'));
      assert.ok(reasons.slice(callsPerConnection).every((reason) => reason === 'rate-limited'));
      const last = await nonsense();
      if (last?.reason === undefined && last?.code === status.UNAVAILABLE) closed += 1;
      assert.equal(closed, 1, 'the connection was closed without an answer');
      assert.equal((await neighbour.save({ permanent: Buffer.from('P') })).generation, 1n);
      await serving();
    });

    it('I-10 makes two Loads at most: more are refused by name', async () => {
      const hostile = client();
      const reasons: (string | undefined)[] = [];
      for (let call = 1; call <= 4; call++) {
        const ticket = manager.toolstack.ticket(hostile.managerId, testVtpm(), hostile.keys.publicKey, {
          expectedEpoch: 7n,
        });
        await assert.rejects(hostile.load(ticket), (error: RefusedError) => {
          reasons.push(error.reason);
          return true;
        });
      }
      assert.deepEqual(reasons, ['stale-epoch', 'stale-epoch', 'rate-limited', 'rate-limited']);
    });
  });

  describe('one user with many connections', () => {
    let directory: string;
    let listener: GrpcListener;
    const open: WorkerClient[] = [];

    beforeEach(() => {
      directory = mkdtempSync(join(tmpdir(), 'vtpm-limits-'));
    });
    afterEach(async () => {
      for (const client of open.splice(0)) client.close();
      await listener.close();
      rmSync(directory, { recursive: true });
    });

    async function serve(limits: Partial<Limits>, load: WorkerService['load']): Promise<() => WorkerClient> {
      const path = join(directory, 'worker.sock');
      const attach = () => Promise.reject(new Error('not asked for'));
      listener = await serveWorkers(path, () => ({ load, attach }), log, { ...DEFAULT_LIMITS, ...limits });
      return () => {
        const made = new WorkerClient(path, Buffer.alloc(32));
        open.push(made);
        return made;
      };
    }

    const answer: WorkerService['load'] = async (_request, _connection, admit) => {
      admit?.();
      return { nonce: Buffer.alloc(24), box: Buffer.alloc(16) };
    };
    const reasonOf = async (call: Promise<unknown>): Promise<string | undefined> =>
      await call.then(
        () => 'served',
        (error: RefusedError) => error.reason ?? `status ${error.code}`,
      );

    it('I-10 Loads of a uid have a rate: those above it are refused by name', async () => {
      const client = await serve({ loadsPerUid: { burst: 3, perSecond: 0.001 } }, answer);
      const reasons: (string | undefined)[] = [];
      for (let at = 0; at < 5; at++) reasons.push(await reasonOf(client().call(LOAD_PATH, LOAD)));
      assert.deepEqual(reasons, ['served', 'served', 'served', 'rate-limited', 'rate-limited']);
    });

    it('I-10 the rate gives back what it took', async () => {
      const client = await serve({ loadsPerUid: { burst: 1, perSecond: 1000 } }, answer);
      for (let at = 0; at < 5; at++) {
        let reason: string | undefined;
        do reason = await reasonOf(client().call(LOAD_PATH, LOAD));
        while (reason === 'rate-limited');
        assert.equal(reason, 'served');
      }
    });

    it('I-10 connections of a uid have a rate: those above it are closed', async () => {
      const client = await serve({ connectionsPerUid: { burst: 2, perSecond: 0.001 } }, answer);
      const [first, second, third] = [client(), client(), client()];
      assert.equal(await reasonOf(first.call(LOAD_PATH, LOAD)), 'served');
      assert.equal(await reasonOf(second.call(LOAD_PATH, LOAD)), 'served');
      assert.equal(await reasonOf(third.call(LOAD_PATH, LOAD)), `status ${status.UNAVAILABLE}`);
      assert.equal(await reasonOf(first.call(LOAD_PATH, LOAD)), 'served', 'those that are there stay');
    });

    it('I-10 a Load has a deadline: what the store does not do in time is said, and others are served', async () => {
      let calls = 0;
      const client = await serve({ loadDeadlineMs: 50 }, async (...args) => {
        calls += 1;
        return calls === 1 ? await new Promise(() => undefined) : await answer(...args);
      });
      await assert.rejects(client().call(LOAD_PATH, LOAD), (error: RefusedError) => {
        assert.equal(error.code, status.DEADLINE_EXCEEDED);
        assert.equal(error.reason, 'deadline');
        return true;
      });
      assert.equal(await reasonOf(client().call(LOAD_PATH, LOAD)), 'served');
    });
  });
});
