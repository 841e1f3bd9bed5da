import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { createLogger } from 'vtpm-common';
import { ManagerError } from 'vtpm-manager';
import { serveWorkers } from 'vtpm-manager/grpc/server';
import { VtpmRegistry } from 'vtpm-manager/ownership/registry';
import { Slot } from 'vtpm-manager/ownership/slot';
import { createAnchoredStore } from 'vtpm-manager/store/index';
import { createTrustStore, openTrustStore } from 'vtpm-manager/trust/trust-configuration';
import { MemoryStore } from '../support/memory-store.js';
import { anchorOptions, testKeys, unwatched } from '../support/test-keys.js';
import {
  type RefusedError,
  TestSession,
  TestToolstack,
  testVtpm,
  WorkerClient,
} from '../support/worker-client.js';

const log = createLogger('test', { 'log-level': 'silent', 'log-format': 'json' });

describe('links that are lost at once', () => {
  const toolstack = new TestToolstack();
  const keys = testKeys();
  const managerId = keys.identity.publicKey;
  const directory = mkdtempSync(join(tmpdir(), 'vtpm-links-'));
  const path = join(directory, 'worker.sock');
  const worker = new WorkerClient(path, managerId);
  let registry: VtpmRegistry;
  let close: () => Promise<void>;

  before(async () => {
    const store = await createAnchoredStore(new MemoryStore(), anchorOptions(keys));
    await createTrustStore(keys, store, toolstack.key.publicKey, 1n);
    const trust = await openTrustStore(keys, store);
    await trust.allowImage(toolstack.imageDigest, '', 1n);
    registry = new VtpmRegistry({ keys, store, trust, ...unwatched });
    const listener = await serveWorkers(path, () => registry, log);
    close = async () => {
      await registry.close();
      await listener.close();
    };
  });
  after(async () => {
    worker.close();
    await close();
    rmSync(directory, { recursive: true });
  });

  it('a worker that goes while it is let in is not connected for ever', async () => {
    const vtpm = testVtpm();
    const grant = await worker.load(toolstack.ticket(managerId, vtpm, worker.keys.publicKey));
    const session = new TestSession(vtpm, grant);
    const gone = new ManagerError('fenced', 'the stream has ended');
    const link = { send: () => Promise.reject(gone), end: () => undefined };
    await assert.rejects(
      registry.attach({ ...session.firstFrame(), sessionId: grant.sessionId }, link, {}),
      (error) => error === gone,
    );
    assert.equal((await registry.view(vtpm.id)).isConnected, false);
    await registry.retire(vtpm.id, 'manager');
  });

  it('a stream for a vTPM that is not there leaves nothing behind', async () => {
    const made: string[] = [];
    const { inOrder } = Slot.prototype;
    Slot.prototype.inOrder = function (operation) {
      made.push(this.vtpmUuid);
      return inOrder.call(this, operation) as ReturnType<typeof operation>;
    };
    try {
      // On a link of its own: a session binds the first one.
      const hostile = new WorkerClient(path, managerId);
      for (let count = 0; count < 10; count++) {
        const stream = hostile.openStream();
        const frame = {
          type: 'RESUME',
          sequence: 1n,
          nonce: randomBytes(12),
          sealed: randomBytes(48),
        } as const;
        stream.send({ ...frame, vtpmUuid: randomBytes(16), sessionId: randomBytes(16) });
        const refusal = (await stream.ended) as RefusedError;
        assert.equal(refusal.reason, 'fenced', refusal.message);
      }
      hostile.close();
    } finally {
      Slot.prototype.inOrder = inOrder;
    }
    assert.deepEqual(made, []);
  });
});
