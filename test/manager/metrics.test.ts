import assert from 'node:assert/strict';
import { once } from 'node:events';
import { type IncomingMessage, request } from 'node:http';
import { ManagerInstallation, StandInTpm } from '../support/manager-process.js';
import { until } from '../support/until.js';
import { testVtpm } from '../support/worker-client.js';

/** A scrape as Prometheus does it: by sample name with its labels. */
async function scrape(manager: ManagerInstallation): Promise<Map<string, number>> {
  const call = request({ socketPath: manager.paths.adminSocket, path: '/metrics' });
  call.end();
  const [response] = (await once(call, 'response')) as [IncomingMessage];
  assert.equal(response.statusCode, 200);
  assert.match(response.headers['content-type'] ?? '', /^text\/plain; version=0\.0\.4/);
  let text = '';
  for await (const chunk of response.setEncoding('utf8')) text += chunk;
  const samples = new Map<string, number>();
  for (const line of text.split('\n').filter((each) => each !== '' && !each.startsWith('#'))) {
    const [, name, value] = /^(\w+(?:\{[^}]*\})?) (\S+)$/.exec(line) ?? assert.fail(line);
    assert.ok(!samples.has(name!) && Number.isFinite(Number(value)), line);
    samples.set(name!, Number(value));
  }
  return samples;
}

interface Anchor {
  readonly stalledSince: string | null;
  readonly pendingSince: string | null;
  readonly reason?: string;
}

describe('the metrics', () => {
  let manager: ManagerInstallation;
  let tpm: StandInTpm;
  let managerId: string;

  beforeEach(async () => {
    manager = new ManagerInstallation();
    tpm = new StandInTpm();
    await tpm.start();
    managerId = String((await manager.init(`unix:${tpm.socket}`)).managerId);
  });
  afterEach(async () => {
    await manager.remove();
    await tpm.stop();
  });

  it('count what workers and operators did', async () => {
    await manager.start();
    const before = await scrape(manager);
    assert.deepEqual(
      [
        before.get('vtpm_ready'),
        before.get('vtpm_vtpms{kind="live"}'),
        before.get('vtpm_saves_total{result="committed"}'),
      ],
      [1, 0, 0],
    );
    const image = { digest: manager.toolstack.imageDigest.toString('hex') };
    const vtpm = testVtpm();
    const worker = manager.worker(managerId);
    const ticket = () => manager.toolstack.ticket(worker.managerId, vtpm, worker.keys.publicKey);
    await assert.rejects(worker.load(ticket()));
    await manager.admin('POST', '/images', image);
    const session = await worker.session(vtpm, await worker.load(ticket()));
    await session.save({ permanent: Buffer.alloc(1000, 1) });
    await session.save({ permanent: Buffer.alloc(1000, 2) });
    const running = await scrape(manager);
    const of = (name: string) => running.get(name);
    assert.equal(of('vtpm_loads_total{result="image-not-allowed"}'), 1);
    assert.equal(of('vtpm_loads_total{result="granted"}'), 1);
    assert.equal(of('vtpm_saves_total{result="committed"}'), 2);
    assert.ok((of('vtpm_save_bytes_total') ?? 0) >= 2000);
    assert.equal(of('vtpm_connected_workers'), 1);
    assert.equal(of('vtpm_vtpms{kind="live"}'), 1);
    // The image, the Load and both Saves.
    assert.equal(of('vtpm_commit_duration_seconds_count'), 4);
    assert.equal(of('vtpm_commit_writes_sum'), 4);
    // The image, and the first save of a vTPM.
    assert.equal(of('vtpm_anchor_steps_total'), 2);
    assert.ok((of('vtpm_anchor_pending_since_seconds') ?? 0) > 1_600_000_000);
    assert.equal(of('vtpm_anchor_stalled_since_seconds'), undefined);
    assert.equal(of('vtpm_store_records'), 2);
    assert.equal(of('vtpm_root_key_generation'), 1);
    assert.equal(of('vtpm_rotation_running'), 0);
    for (const name of ['vtpm_tpm_commands_total', 'vtpm_tree_bytes', 'vtpm_heap_used_bytes']) {
      assert.ok((of(name) ?? 0) > 0, name);
    }
    const { body } = await manager.admin('GET', '/audit?tail=1');
    assert.equal(of('vtpm_audit_entries'), body.length);
    session.stream!.end();
    await session.stream!.ended;
    await manager.admin('POST', `/vtpms/${vtpm.id}/retire`);
    const retired = await scrape(manager);
    assert.deepEqual(
      [retired.get('vtpm_vtpms{kind="live"}'), retired.get('vtpm_vtpms{kind="retired"}')],
      [0, 1],
    );
    assert.equal(retired.get('vtpm_connected_workers'), 0);
    assert.ok((retired.get('vtpm_erasure_pending_since_seconds') ?? 0) > 1_600_000_000);
    await manager.stop();
    await manager.start();
    const restarted = await scrape(manager);
    assert.deepEqual(
      [restarted.get('vtpm_vtpms{kind="live"}'), restarted.get('vtpm_vtpms{kind="retired"}')],
      [0, 1],
    );
    assert.equal((await manager.admin('GET', '/health')).body.vtpms, 1);
    worker.close();
  });

  it('say why the manager is locked, and nothing of a store that is not open', async () => {
    await tpm.extendPcr(7);
    await manager.start();
    const samples = await scrape(manager);
    assert.equal(samples.get('vtpm_ready'), 0);
    assert.equal(samples.get('vtpm_locked{reason="platform-policy"}'), 1);
    for (const name of [
      'vtpm_vtpms{kind="live"}',
      'vtpm_store_records',
      'vtpm_anchor_pending_since_seconds',
    ]) {
      assert.equal(samples.get(name), undefined, name);
    }
  });

  it('and the health say since when the counter of the TPM cannot be advanced', async () => {
    await manager.start();
    const { anchor: before } = (await manager.admin('GET', '/health')).body as { anchor: Anchor };
    assert.equal(before.stalledSince, null);
    await tpm.kill();
    const change = manager.admin('POST', '/images', { digest: 'ab'.repeat(32) });
    let anchor: Anchor | undefined;
    await until('the step has failed', async () => {
      anchor = (await manager.admin('GET', '/health')).body.anchor as Anchor;
      return anchor.stalledSince !== null;
    });
    assert.equal(anchor?.reason, 'tpm-unreachable');
    assert.ok(anchor?.pendingSince);
    const stalled = await scrape(manager);
    assert.ok((stalled.get('vtpm_anchor_step_failures_total') ?? 0) >= 1);
    assert.equal(
      stalled.get('vtpm_anchor_stalled_since_seconds'),
      Date.parse(anchor?.stalledSince ?? '') / 1000,
    );
    await tpm.start();
    assert.equal((await change).status, 201);
    const { anchor: after } = (await manager.admin('GET', '/health')).body as { anchor: Anchor };
    assert.equal(after.stalledSince, null);
    assert.equal((await scrape(manager)).get('vtpm_anchor_stalled_since_seconds'), undefined);
  });
});
