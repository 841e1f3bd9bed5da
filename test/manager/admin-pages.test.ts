import assert from 'node:assert/strict';
import { randomBytes, randomUUID } from 'node:crypto';
import { once } from 'node:events';
import { mkdtempSync, rmSync } from 'node:fs';
import { type IncomingMessage, request } from 'node:http';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { createLogger } from 'vtpm-common';
import { type AdminPlane, serveAdmin } from 'vtpm-manager/admin/server';
import { Census } from 'vtpm-manager/ownership/census';
import { VtpmRegistry } from 'vtpm-manager/ownership/registry';
import { encodeRecord, newRecord } from 'vtpm-manager/records/index';
import { createAnchoredStore } from 'vtpm-manager/store/index';
import { createTrustStore, openTrustStore } from 'vtpm-manager/trust/trust-configuration';
import { uuidToBytes } from 'vtpm-proto';
import { MemoryStore } from '../support/memory-store.js';
import { anchorOptions, testKeys, unwatched } from '../support/test-keys.js';

const VTPMS = 50_000;
/** What the toolstack's readers take at most. */
const MAX_ANSWER_BYTES = 1024 * 1024;

/** A store that says how many of its records were asked for and not yet handed over. */
class WatchedStore extends MemoryStore {
  most = 0;
  #underWay = 0;

  override async get(key: string) {
    this.#underWay += 1;
    this.most = Math.max(this.most, this.#underWay);
    // As from another process: not in the same turn.
    await new Promise((resolve) => setImmediate(resolve));
    this.#underWay -= 1;
    return await super.get(key);
  }
}

describe('pages of 50,000 vTPMs', () => {
  const directory = mkdtempSync(join(tmpdir(), 'vtpm-admin-'));
  const path = join(directory, 'admin.sock');
  const raw = new WatchedStore();
  const census = new Census();
  let registry: VtpmRegistry;
  let plane: AdminPlane;

  before(async () => {
    const keys = testKeys();
    const store = await createAnchoredStore(raw, anchorOptions(keys));
    await createTrustStore(keys, store, randomBytes(32), 0n);
    const session = {
      sessionId: randomBytes(16),
      workerKey: randomBytes(32),
      lastSequence: 0n,
      lastDigest: new Uint8Array(0),
      imageDigest: randomBytes(32),
      isolation: 'sandbox',
      verbs: [],
    };
    const load = {
      vmRunId: randomBytes(16),
      bootId: randomBytes(16),
      session,
      libtpmsVersion: '0.9.2',
      keepsVolatile: false,
    };
    const writes: Promise<number>[] = [];
    for (let i = 0; i < VTPMS; i++) {
      const id = randomUUID();
      const record = newRecord(keys, { vtpmUuid: uuidToBytes(id), vmUuid: randomBytes(16) }, load, 1n);
      writes.push(store.write(`vtpm/${id}`, 0, encodeRecord(keys, record)));
      census.note(undefined, record.header);
    }
    await Promise.all(writes);
    const trust = await openTrustStore(keys, store);
    registry = new VtpmRegistry({ keys, store, trust, ...unwatched, census });
    const unused = (): never => assert.fail('not called');
    plane = await serveAdmin({
      path,
      log: createLogger('test', { 'log-level': 'silent', 'log-format': 'json' }),
      auditPath: directory,
      health: () => ({ instance: 'x' }) as ReturnType<Parameters<typeof serveAdmin>[0]['health']>,
      service: () => ({ registry }) as ReturnType<Parameters<typeof serveAdmin>[0]['service']>,
      metrics: unused,
      doctor: unused,
      erasure: unused,
      platform: unused,
      audit: unused,
    });
  });
  after(async () => {
    await plane.close();
    rmSync(directory, { recursive: true });
  });

  async function open(target: string): Promise<IncomingMessage> {
    const call = request({ socketPath: path, path: target });
    call.end();
    const [response] = (await once(call, 'response')) as [IncomingMessage];
    assert.equal(response.statusCode, 200);
    return response.setEncoding('utf8');
  }

  it('have each once and in order, eight records in memory at a time, beside the event stream', async () => {
    const events = await open('/events');
    const lines: string[] = [];
    events.on('data', (text: string) => lines.push(...text.split('\n').filter(Boolean)));
    const ids: string[] = [];
    let next: string | undefined;
    do {
      const response = await open(`/vtpms?limit=1000${next === undefined ? '' : `&after=${next}`}`);
      registry.events.emit({ type: 'saved', id: randomUUID(), epoch: 1n, generation: 1n });
      let text = '';
      for await (const chunk of response) text += chunk;
      assert.ok(text.length < MAX_ANSWER_BYTES, String(text.length));
      const page = JSON.parse(text) as { vtpms: { id: string }[]; next?: string };
      ids.push(...page.vtpms.map(({ id }) => id));
      next = page.next;
    } while (next !== undefined);
    assert.deepEqual([ids.length, new Set(ids).size], [VTPMS, VTPMS]);
    assert.deepEqual(ids, [...ids].sort());
    assert.ok(raw.most <= 8, `${raw.most} at a time`);
    while (lines.length < 1 + VTPMS / 1000) await once(events, 'data');
    assert.equal(lines.filter((line) => line.includes('"saved"')).length, VTPMS / 1000);
    assert.deepEqual([registry.census.live, registry.census.retired], [VTPMS, 0]);
    events.destroy();
  });

  it('leave the event stream to those types that are wanted', async () => {
    const events = await open('/events?types=fenced,moved');
    let text = '';
    events.on('data', (chunk: string) => {
      text += chunk;
    });
    for (const type of ['saved', 'fenced', 'loaded', 'moved'] as const) {
      registry.events.emit({ type, id: randomUUID(), epoch: 1n, generation: 1n });
    }
    while (!text.includes('"moved"')) await once(events, 'data');
    const types = text
      .trim()
      .split('\n')
      .map((line) => (JSON.parse(line) as { type: string }).type);
    assert.deepEqual(types, ['hello', 'fenced', 'moved']);
    events.destroy();
  });
});
