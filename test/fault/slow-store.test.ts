import assert from 'node:assert/strict';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { createLogger } from 'vtpm-common';
import { type GrpcListener, serveWorkers } from 'vtpm-manager/grpc/server';
import { VtpmRegistry } from 'vtpm-manager/ownership/registry';
import { createAnchoredStore } from 'vtpm-manager/store/index';
import { createTrustStore, openTrustStore } from 'vtpm-manager/trust/trust-configuration';
import { LARGEST_SAVE } from '../support/hostile-worker.js';
import { MemoryStore } from '../support/memory-store.js';
import { anchorOptions, testKeys, unwatched } from '../support/test-keys.js';
import { until } from '../support/until.js';
import { type TestSession, TestToolstack, testVtpm, WorkerClient } from '../support/worker-client.js';

const log = createLogger('test', { 'log-level': 'silent', 'log-format': 'json' });
/** As many of the largest Saves as do not fit into what is worked on at once. */
const WORKERS = 208;
const MAX_WORK_BYTES = 64 * 1024 * 1024;

describe('I-8 a store that does not answer', () => {
  const toolstack = new TestToolstack();
  const keys = testKeys();
  const managerId = keys.identity.publicKey;
  const disk = new MemoryStore();
  const workers: WorkerClient[] = [];
  let directory: string;
  let registry: VtpmRegistry;
  let listener: GrpcListener;

  before(async () => {
    directory = mkdtempSync(join(tmpdir(), 'vtpm-slow-'));
    const store = await createAnchoredStore(disk, anchorOptions(keys));
    await createTrustStore(keys, store, toolstack.key.publicKey, 1n);
    const trust = await openTrustStore(keys, store);
    await trust.allowImage(toolstack.imageDigest, '', 1n);
    registry = new VtpmRegistry({ keys, store, trust, ...unwatched });
    listener = await serveWorkers(join(directory, 'worker.sock'), () => registry, log);
  });
  afterEach(() => {
    disk.beforeCommit = () => undefined;
    for (const worker of workers.splice(0)) worker.close();
  });
  after(async () => {
    await registry.close();
    await listener.close();
    rmSync(directory, { recursive: true });
  });

  async function serving(): Promise<{ worker: WorkerClient; session: TestSession }> {
    const worker = new WorkerClient(join(directory, 'worker.sock'), managerId);
    workers.push(worker);
    const vtpm = testVtpm();
    const grant = await worker.load(toolstack.ticket(managerId, vtpm, worker.keys.publicKey));
    return { worker, session: await worker.session(vtpm, grant) };
  }

  /** Commits wait until the function that is returned is called. */
  function stopDisk(): () => void {
    let go: () => void = () => undefined;
    const gate = new Promise<void>((resolve) => {
      go = resolve;
    });
    disk.beforeCommit = () => gate;
    return go;
  }

  it('I-8 holds a bounded part of the Saves, and acknowledges all of them when it answers again', async () => {
    const all = await Promise.all(Array.from({ length: WORKERS }, () => serving()));
    const go = stopDisk();
    const acks = all.map(({ session }) => session.save(LARGEST_SAVE));
    const most = MAX_WORK_BYTES - 512 * 1024;
    await until('all that is worked on at once', () => registry.work.bytes > most);
    assert.ok(registry.work.bytes <= MAX_WORK_BYTES, `${registry.work.bytes} bytes are worked on`);
    go();
    for (const ack of await Promise.all(acks)) assert.equal(ack.generation, 1n);
    assert.equal(registry.work.bytes, 0);
  });

  it('I-8 does not pile up what a worker asks for that comes back again and again', async () => {
    const { worker, session } = await serving();
    const go = stopDisk();
    const save = session.save({ permanent: Buffer.from('P') });
    await until('the commit', () => registry.work.bytes > 0);
    const answers = Array.from({ length: 40 }, () => {
      const link = { send: async () => undefined, end: () => undefined };
      return registry.attach(session.firstFrame({ lastSent: 1n, lastAcknowledged: 0n }), link, {}).then(
        () => 'attached',
        (error: { code: string }) => error.code,
      );
    });
    await until('refusals', async () => {
      const first = await Promise.race([...answers.slice(33), Promise.resolve('none yet')]);
      return first === 'busy';
    });
    go();
    await save.catch(() => undefined);
    const counted = await Promise.all(answers);
    // One place is the save's.
    assert.equal(counted.filter((answer) => answer === 'attached').length, 31);
    assert.equal(counted.filter((answer) => answer === 'busy').length, 9);
    worker.close();
  });
});
