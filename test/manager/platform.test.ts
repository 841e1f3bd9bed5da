import assert from 'node:assert/strict';
import { copyFileSync, readFileSync } from 'node:fs';
import type { RefusedError } from '../support/worker-client.js';
import { crashingAt, Host, makeAuthority, NAME, PCR, SELECTION } from './platform-fixture.js';

const code = (body: Record<string, unknown>) => (body.error as { code: string }).code;
const message = (body: Record<string, unknown>) => (body.error as { message: string }).message;

describe('the platform policy of a running manager', () => {
  let host: Host;
  beforeEach(async () => {
    host = await Host.create();
  });
  afterEach(() => host.destroy());

  it('a firmware update day: approved ahead, booted, ready', async () => {
    await host.manager.start();
    await host.adopt('firmware 1');
    await host.allowImage();
    const guest = await host.guest();
    // What the next boot measures, known beforehand.
    await host.manager.stop();
    await host.extend('firmware 2');
    await host.manager.start();
    const next = await host.pcr();
    await host.manager.stop();
    await host.reboot();

    assert.equal((await host.manager.start()).status, 'ready', 'firmware 1');
    const outcome = await host.approve('firmware 2', { pcrs: { [NAME]: next } });
    assert.equal((outcome.approval as { state: string }).state, 'ready');
    await host.manager.stop();
    await host.reboot();
    await host.extend('firmware 2');
    assert.equal((await host.manager.start()).status, 'ready', 'firmware 2');
    await host.resume(guest);
    assert.equal((await guest.session.save({ permanent: Buffer.from('P2') })).generation, 2n);
    const view = await host.view();
    const states = (view.approvals as { label: string; state: string }[]).map((a) => `${a.label} ${a.state}`);
    assert.deepEqual(states, ['firmware 1 ready', 'firmware 2 active']);
  });

  it('an unapproved change locks, names the PCR, and an approval unlocks without a restart', async () => {
    await host.manager.start();
    await host.adopt('firmware 1');
    await host.allowImage();
    const guest = await host.guest();
    await host.manager.stop();
    await host.extend('unknown');
    const health = await host.manager.start();
    assert.equal(health.status, 'locked');
    assert.equal(health.reason, 'platform-policy');
    assert.match(String(health.message), /PCR sha256:16 is [0-9a-f]{16}… .*"firmware 1".*platform approve/);

    // Nothing else works, and says why.
    const refused = await host.manager.admin('GET', '/vtpms');
    assert.equal(refused.status, 503);
    assert.match(message(refused.body), /PCR sha256:16/);
    guest.worker.close();
    const waiting = host.manager.worker(host.managerId);
    await assert.rejects(guest.session.connect(waiting.openStream()), (error: RefusedError) => {
      assert.equal(error.reason, 'locked');
      return true;
    });
    waiting.close();
    assert.equal((await host.view()).isApproved, false);

    // One of other values is kept, and does not unlock.
    const other = await host.approve('for later', { pcrs: { [NAME]: 'ab'.repeat(32) } });
    assert.equal(other.isUnlocked, false);
    assert.equal((other.lockedBecause as { code: string }).code, 'platform-policy');
    const approval = await host.signed('this one');
    const both = await Promise.all([
      host.post('/platform/approvals', { approval }),
      host.post('/platform/approvals', { approval }),
    ]);
    for (const { status, body } of both) {
      assert.equal(status, 201, JSON.stringify(body));
      assert.equal(body.lockedBecause, null);
    }
    assert.equal((await host.manager.admin('GET', '/health')).body.status, 'ready');
    await host.resume(guest);
    assert.equal((await guest.session.save({ permanent: Buffer.from('P2') })).generation, 2n);
    // Stops in order: nothing was opened twice.
    assert.equal(await host.manager.stop(), 0);
    assert.equal((await host.manager.start()).status, 'ready');
  });

  it('stops in order in the middle of an unlock', async () => {
    await host.manager.start();
    await host.adopt();
    await host.manager.stop();
    await host.extend('unknown');
    assert.equal((await host.manager.start()).status, 'locked');
    const approval = await host.signed('this one');
    const asked = host.post('/platform/approvals', { approval }).catch(() => undefined);
    assert.equal(await host.manager.stop(), 0);
    await asked;
    // The approval may have come or not; the store was not left half open.
    const { status } = await host.manager.start();
    assert.ok(status === 'ready' || status === 'locked');
    await host.approve('this one');
    assert.equal((await host.manager.admin('GET', '/health')).body.status, 'ready');
  });

  it('I-6 a revoked approval is dead, with the old approvals and the old enrolment put back too', async () => {
    const { paths } = host.manager;
    await host.manager.start();
    await host.adopt('firmware 1');
    await host.manager.stop();
    await host.extend('firmware 2');
    await host.manager.start();
    await host.approve('firmware 2');
    const [approvals, enrolment] = [host.file('approvals', ''), host.file('enrolment', '')];
    copyFileSync(paths.approvals, approvals);
    copyFileSync(paths.enrolment, enrolment);

    // Positive control: firmware 1 opens until it is revoked.
    await host.manager.stop();
    await host.reboot();
    assert.equal((await host.manager.start()).status, 'ready', 'firmware 1, before');
    await host.manager.stop();
    await host.extend('firmware 2');
    assert.equal((await host.manager.start()).status, 'ready');

    const survivor = await host.signed('firmware 2', { next: true });
    const { status, body } = await host.post('/platform/revocations', { survivors: [survivor] });
    assert.equal(status, 200, JSON.stringify(body));
    assert.deepEqual(body.revoked, ['firmware 1']);
    await host.manager.stop();
    assert.equal((await host.manager.start()).status, 'ready', 'the survivor');
    await host.manager.stop();
    await host.reboot();
    const dead = await host.manager.start();
    assert.equal(dead.status, 'locked');
    assert.match(String(dead.message), /revoked.*"firmware 1"/);
    await host.manager.stop();
    copyFileSync(approvals, paths.approvals);
    copyFileSync(enrolment, paths.enrolment);
    assert.equal((await host.manager.start()).status, 'locked', 'with the old files');
  });

  it('refuses a revocation that would lock the host, and changes nothing', async () => {
    await host.manager.start();
    const none = await host.post('/platform/revocations', { survivors: [] });
    assert.match(message(none.body), /no policy authority/);
    await host.adopt('firmware 1');
    const counter = (await host.view()).counter;
    const elsewhere = await host.signed('other', { next: true, pcrs: { [NAME]: 'cd'.repeat(32) } });
    const tooEarly = await host.signed('now');
    const otherPcrs = await host.signed('other PCRs', { next: true, pcrSelection: 'sha256:23' });
    const stranger = await host.signed('stranger', { next: true }, makeAuthority());
    for (const [survivors, reason] of [
      [[], /stay locked/],
      [[elsewhere], /stay locked/],
      [[otherPcrs], /stay locked/],
      [[tooEarly], /for counter \d+/],
      [[stranger], /not signed by the authority/],
      [[{ ...elsewhere, label: 5 }], /not signed by the authority/],
    ] as const) {
      const { status, body } = await host.post('/platform/revocations', { survivors });
      assert.equal(status, 400);
      assert.match(message(body), reason);
    }
    assert.equal((await host.view()).counter, counter);
    // Two at once: the second one finds its survivors signed for the value that is now.
    const survivors = [await host.signed('firmware 1', { next: true })];
    const both = await Promise.all([
      host.post('/platform/revocations', { survivors }),
      host.post('/platform/revocations', { survivors }),
    ]);
    assert.deepEqual(both.map(({ status }) => status).sort(), [200, 400]);
    await host.manager.stop();
    assert.equal((await host.manager.start()).status, 'ready');
  });

  it('I-6 goes over to an authority: the old enrolment with the old disk is worthless', async () => {
    await host.manager.start();
    await host.allowImage();
    await host.guest();
    await host.manager.stop();
    const disk = host.saveDisk();
    // Positive control: nothing but the rotation makes it worthless. A stop in order would have the TPM count.
    assert.equal((await host.manager.start()).status, 'ready');
    await host.manager.stop('SIGKILL');
    host.restoreDisk(disk);
    await host.manager.start();
    await host.adopt();
    await host.manager.stop();
    await host.assertNothingLeft();
    const newest = host.saveDisk('newest');
    host.restoreDisk(disk);
    await assert.rejects(host.manager.start(), /NV index .*half of the root key.* is gone.*\(tpm-emptied\)/s);
    host.restoreDisk(newest);
    assert.equal((await host.manager.start()).status, 'ready');
    // And back to none, under another PCR.
    const { status, body } = await host.post('/platform/policy', {
      authority: null,
      pcrSelection: 'sha256:16,23',
    });
    assert.equal(status, 200, JSON.stringify(body));
    assert.deepEqual(body, { generation: 3, policy: 'fixed', pcrSelection: 'sha256:16,23' });
    await host.manager.stop();
    await host.assertNothingLeft();
    assert.equal((await host.manager.start()).status, 'ready');
    await host.manager.stop();
    await host.extend('unknown');
    const locked = await host.manager.start();
    assert.match(String(locked.message), /PCR sha256:16 is .*vtpmctl recover/);
  });

  it('adopts nothing that would not open now, and leaves nothing in the TPM', async () => {
    await host.manager.start();
    const { authority } = host;
    const refused = await host.post('/platform/policy', { authority: authority.publicKey });
    assert.equal(code(refused.body), 'platform-policy');
    assert.equal((await host.view()).policy, 'fixed');
    await host.manager.stop();
    assert.equal((await host.manager.start()).status, 'ready');
    assert.equal((await host.post('/platform/rotations')).status, 200);
    await host.manager.stop();
    await host.assertNothingLeft();
  });

  it('writes down who did what, also while it was locked', async () => {
    await host.manager.start();
    await host.adopt('firmware 1');
    await host.manager.stop();
    await host.extend('unknown');
    await host.manager.start();
    await host.approve('this one');
    await host.manager.stop();
    const entries = readFileSync(host.manager.paths.audit, 'utf8')
      .trimEnd()
      .split('\n')
      .map(
        (line) =>
          JSON.parse(line) as { action: string; actor: unknown; verdict: string; facts?: { label?: string } },
      );
    const seen = entries.map(({ action, verdict }) => `${action} ${verdict}`);
    assert.deepEqual(seen.slice(seen.indexOf('platform-approve intended')), [
      'platform-approve intended',
      'platform-approve done',
      'platform-authority intended',
      'platform-rotate intended',
      'platform-rotate done',
      'stop done',
      'locked done',
      'platform-approve intended',
      'platform-approve done',
      'start done',
      'stop done',
    ]);
    const approvals = entries.filter(({ action }) => action === 'platform-approve');
    for (const { actor } of approvals) assert.deepEqual(actor, { uid: process.getuid?.() });
    assert.deepEqual(
      approvals.map(({ facts }) => facts?.label),
      ['firmware 1', 'firmware 1', 'this one', 'this one'],
    );
  });

  it('takes no approval that the log does not speak of, wherever a crash ends it', async () => {
    await host.manager.start({ nodeArgs: crashingAt('platform.done', 2) });
    await host.adopt('firmware 1');
    const approval = await host.signed('firmware 2', { pcrs: { [NAME]: 'ab'.repeat(32) } });
    await assert.rejects(host.post('/platform/approvals', { approval }));
    await host.manager.start();
    const { approvals } = (await host.view()) as { approvals: { label: string }[] };
    assert.deepEqual(approvals.map(({ label }) => label).sort(), ['firmware 1', 'firmware 2']);
    const { body } = await host.manager.admin('GET', '/audit?tail=20');
    const about = (body.entries as { verdict: string; facts?: { label?: string } }[])
      .filter(({ facts }) => facts?.label === 'firmware 2')
      .map(({ verdict }) => verdict);
    assert.deepEqual(about, ['intended']);
  });

  it('checks its bodies strictly', async () => {
    await host.manager.start();
    for (const [path, body, reason] of [
      ['requests', {}, /"label"/],
      ['requests', { label: 'x', pcr: {} }, /takes label, pcrs, next, pcrSelection, not "pcr"/],
      ['requests', { label: 'x', pcrs: { [NAME]: 'AB'.repeat(32) } }, /64 hex digits/],
      ['requests', { label: 'x', pcrs: { 'sha256:1': '00'.repeat(32) } }, /not of the selection/],
      ['requests', { label: 'x', pcrs: [1] }, /"pcrs" is an object/],
      ['requests', { label: 'x', next: 'yes' }, /"next"/],
      ['requests', { label: 'x', pcrSelection: 'sha1:7' }, /SHA-1/],
      ['approvals', {}, /"approval" is missing/],
      ['approvals', { approval: {}, authority: host.authority.publicKey }, /not signed/],
      ['approvals', { approval: {} }, /no policy authority/],
      ['revocations', { survivors: {} }, /"survivors" is a list/],
      ['policy', {}, /say what to change/],
      ['policy', { authority: 'no key' }, /PEM/],
      ['policy', { pcrSelection: 'sha256:99' }, /PCR|pcr/],
      ['rotations', { ownerAuth: 'xyz' }, /in hex/],
      ['rotations', { ownerAuth: 'ab'.repeat(65) }, /at most 64 bytes/],
    ] as const) {
      const answer = await host.post(`/platform/${path}`, body);
      assert.equal(answer.status, 400, `${path} ${JSON.stringify(body)} ${JSON.stringify(answer.body)}`);
      assert.match(message(answer.body), reason);
    }
    assert.equal((await host.manager.admin('GET', '/platform/other')).status, 404);
    assert.equal((await host.view()).generation, 1);
    assert.equal(SELECTION, `sha256:${PCR}`);
  });
});
