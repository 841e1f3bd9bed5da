import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { createLogger } from 'vtpm-common';
import { type AuditLog, createAuditLog } from 'vtpm-manager/audit/index';
import { spoilAnchor } from 'vtpm-manager/store/index';
import { acceptStore } from 'vtpm-manager/store-acceptance';
import { MemoryStore } from '../support/memory-store.js';
import { decisionIn, Journey } from './migration-fixture.js';
import { refused, type Worker, World } from './ownership-fixture.js';

describe('an old store that is accepted', () => {
  let directory: string;
  let a: World;
  let b: World;
  let worker: Worker;
  let way: Journey;
  let old: Awaited<ReturnType<MemoryStore['list']>>;
  beforeEach(async () => {
    directory = mkdtempSync(join(tmpdir(), 'vtpm-log-'));
    a = await World.create();
    b = await World.create();
    worker = await a.manufactured();
    old = await a.disk.list(undefined, Number.MAX_SAFE_INTEGER);
    way = new Journey(a, b, worker, 'OFFLINE');
  });
  afterEach(() => rmSync(directory, { recursive: true, force: true }));

  /** The store from before, and the log as it is now. */
  async function rollBack(): Promise<void> {
    const { keyId: id, auditKey: key } = a.keys.current;
    const audit = join(mkdtempSync(join(directory, 'log-')), 'audit.log');
    const log: AuditLog = await createAuditLog(audit, { id, key });
    for (const event of a.audited) await log.append(event);
    await log.close();
    const store = new MemoryStore(old);
    await spoilAnchor(store, a.keys);
    const paths = { audit } as never;
    const silent = createLogger('test', { 'log-level': 'silent', 'log-format': 'json' });
    const { counter } = a.anchor;
    await acceptStore({ store, keys: a.keys, paths, log: silent, mark: 'rolled-back' }, counter);
    Object.assign(a, { disk: store });
    await a.restart();
  }
  const header = async () => (await a.registry.view(way.id)).header;
  const load = async () =>
    await a.worker(worker.vtpm).load({ expectedEpoch: (await header()).epoch, verbs: ['COLD'] });

  it('I-3 brings nothing to life that has moved since, as the audit log says', async () => {
    await way.expect();
    await way.depart();
    await a.registry.departures.commit(way.id, await way.commit());
    await rollBack();
    assert.deepEqual((await header()).marks, ['rolled-back']);
    await assert.rejects(load(), refused('migrating'));
    const [pending] = await a.registry.departures.pending();
    const { epoch, generation } = pending!;
    const signed = await b.registry.arrivals.abort({ ...way.inquiry(), epoch, generation });
    assert.equal(decisionIn(signed).verdict, 'COMMIT');
    await a.registry.departures.commit(way.id, signed);
    const { kind, epoch: left } = await header();
    assert.deepEqual([kind, left], ['MOVED', 1n]);
  });

  it('I-3 asks of what was on its way; where that came to nothing it goes on here', async () => {
    await way.depart();
    await rollBack();
    await assert.rejects(load(), refused('migrating'));
    await a.registry.departures.abort(way.id, await way.ask());
    assert.ok((await load()).generation > 1n << 32n);
  });

  it('lets go on what stayed, and what came back', async () => {
    await way.depart();
    await a.registry.departures.abort(way.id, await way.ask());
    await rollBack();
    await load();
    old = await a.disk.list(undefined, Number.MAX_SAFE_INTEGER);
    const at = a.worker(worker.vtpm);
    await at.load({ expectedEpoch: (await header()).epoch, verbs: ['COLD'] });
    way = new Journey(a, b, at, 'OFFLINE');
    await way.expect();
    await way.depart();
    await a.registry.departures.commit(way.id, await way.commit());
    const there = b.worker(worker.vtpm);
    await there.load({ expectedEpoch: (await b.registry.view(way.id)).header.epoch, verbs: ['COLD'] });
    const back = new Journey(b, a, there, 'OFFLINE');
    await back.expect();
    await back.depart();
    await back.commit();
    await rollBack();
    await load();
  });

  it('lets go on what was only about to leave', async () => {
    await a.registry.departures.announce(way.id, way.destination);
    const facts = { migration: way.migrationId.toString('hex'), to: 'b', mode: 'OFFLINE' };
    a.audited.push({ actor: 'manager', action: 'migrate-out', verdict: 'failed', vtpm: way.id, facts });
    await rollBack();
    await load();
  });

  it('lets go on what came back, where the log does not say so', async () => {
    await way.depart();
    await a.registry.departures.abort(way.id, await way.ask());
    old = await a.disk.list(undefined, Number.MAX_SAFE_INTEGER);
    a.audited.splice(0, a.audited.length, ...a.audited.filter(({ action }) => action !== 'migrate-abort'));
    await rollBack();
    await load();
  });

  it('believes no entry that is not as a departure writes it', async () => {
    const facts = { migration: randomBytes(16).toString('hex'), to: 'somewhere', mode: 'LIVE' };
    a.audited.push({
      actor: 'manager',
      action: 'freeze',
      verdict: 'done',
      vtpm: way.id,
      epoch: 1n,
      generation: 1n,
      facts,
    });
    await rollBack();
    await load();
  });
});
