import assert from 'node:assert/strict';
import { ManagerInstallation, StandInTpm } from '../support/manager-process.js';
import { testVtpm } from '../support/worker-client.js';
import { crashingAt } from './platform-fixture.js';

const HOUR_MS = 3_600_000;

interface Erasure {
  readonly isDone: boolean;
  readonly retiredAt: string;
  readonly due: string | null;
}

describe('a retired vTPM', () => {
  let manager: ManagerInstallation;
  let tpm: StandInTpm;
  let managerId: string;

  beforeEach(async () => {
    manager = new ManagerInstallation();
    tpm = new StandInTpm();
    await tpm.start();
    managerId = String((await manager.init(`unix:${tpm.socket}`)).managerId);
    await manager.start();
    await manager.admin('POST', '/images', { digest: manager.toolstack.imageDigest.toString('hex') });
  });
  afterEach(async () => {
    await manager.remove();
    await tpm.stop();
  });

  async function retired(): Promise<string> {
    const vtpm = testVtpm();
    const worker = manager.worker(managerId);
    await worker.load(manager.toolstack.ticket(worker.managerId, vtpm, worker.keys.publicKey));
    assert.deepEqual((await manager.admin('GET', `/vtpms/${vtpm.id}`)).body.erasure, null);
    assert.equal((await manager.admin('POST', `/vtpms/${vtpm.id}/retire`)).status, 200);
    worker.close();
    return vtpm.id;
  }
  const erasureOf = async (id: string): Promise<Erasure> =>
    (await manager.admin('GET', `/vtpms/${id}`)).body.erasure as Erasure;

  it('says when its state will be erased on old disks too, and when it is', async () => {
    const first = await retired();
    const waiting = await erasureOf(first);
    assert.equal(waiting.isDone, false);
    const delay = Date.parse(waiting.due ?? '') - Date.parse(waiting.retiredAt);
    assert.equal(delay, 24 * HOUR_MS);
    await manager.stop();
    await manager.start();
    assert.deepEqual(await erasureOf(first), waiting);
    assert.equal((await manager.admin('POST', '/platform/rotations', {})).status, 200);
    assert.deepEqual(await erasureOf(first), { isDone: true, retiredAt: waiting.retiredAt, due: null });
    // Another one does not take it back.
    const second = await retired();
    assert.equal((await erasureOf(second)).isDone, false);
    assert.equal((await erasureOf(first)).isDone, true);
  });

  it('is in the audit log as done after a crash that came before, once it is repeated', async () => {
    await manager.stop();
    await manager.start({ nodeArgs: crashingAt('retire.written', 1) });
    await assert.rejects(retired());
    await manager.start();
    const [{ id } = { id: '' }] = (await manager.admin('GET', '/vtpms')).body.vtpms as { id: string }[];
    assert.equal((await manager.admin('POST', `/vtpms/${id}/retire`)).status, 200);
    const { body } = await manager.admin('GET', '/audit?tail=20');
    const entries = body.entries as { action: string; verdict: string; facts?: object }[];
    assert.deepEqual(
      entries.filter(({ action }) => action === 'retire').map(({ verdict, facts }) => [verdict, facts]),
      [
        ['intended', undefined],
        ['done', { repeated: 'yes' }],
      ],
    );
  });

  it('and a change of the platform that was refused are in the audit log', async () => {
    const id = await retired();
    const { status } = await manager.admin('POST', '/platform/approvals', { approval: { label: 'x' } });
    assert.equal(status, 400);
    const { body } = await manager.admin('GET', '/audit?tail=3');
    const entries = body.entries as { action: string; verdict: string; vtpm?: string; actor: object }[];
    assert.deepEqual(
      entries.map(({ action, verdict, vtpm }) => [action, verdict, vtpm]),
      [
        ['retire', 'intended', id],
        ['retire', 'done', id],
        ['platform-approve', 'refused', undefined],
      ],
    );
    for (const { actor } of entries) assert.deepEqual(actor, { uid: process.getuid?.() });
  });
});
