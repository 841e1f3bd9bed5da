import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import type { ManagerErrorCode } from 'vtpm-manager';
import type { SaveBody, StateAction, Ticket, Verb } from 'vtpm-proto';
import { sha256 } from '../support/worker-client.js';
import { refused, type Worker, World } from './ownership-fixture.js';

const reference = Buffer.alloc(32, 5);
const digest = sha256(reference);
const RUN_2 = Buffer.alloc(16, 9);

function use(action: StateAction, changes: Partial<SaveBody> = {}): Partial<SaveBody> {
  return { permanent: Buffer.from('P'), use: { action, digest }, ...changes };
}

const suspend = use('SUSPEND', { volatile: Buffer.from('V') });

describe('a VMM that takes the state out and brings it in', () => {
  let world: World;
  beforeEach(async () => {
    world = await World.create();
  });

  /** What the log says of vTPMs' states, oldest first. */
  const audited = () =>
    world.audited
      .filter(({ action }) => action !== 'load' && action !== 'fence')
      .map(({ action, verdict, generation, facts }) => ({ action, verdict, generation, facts }));
  const facts = { digest: digest.toString('hex') };

  async function manufactured(verbs: Verb[] = ['MANUFACTURE']): Promise<Worker> {
    const worker = world.worker();
    await worker.load({ verbs });
    await worker.connect();
    await worker.save('P1');
    return worker;
  }

  async function next(worker: Worker, expectedEpoch: bigint, changes: Partial<Ticket> = {}) {
    const other = world.worker(worker.vtpm);
    const verbs: Verb[] = ['COLD', 'RESUME'];
    const grant = await other.load({ expectedEpoch, verbs, ...changes });
    await other.connect();
    return { worker: other, grant };
  }

  it('the suspended state goes to the next worker, whatever VM run that is of, with permanent state and reference as one', async () => {
    const worker = await manufactured();
    assert.equal((await worker.saveBody(suspend)).generation, 2n);
    await world.restart();
    for (const [epoch, vmRunId] of [
      [1n, RUN_2],
      [2n, Buffer.alloc(16, 10)],
      [3n, RUN_2],
    ] as const) {
      const { grant } = await next(worker, epoch, { vmRunId });
      assert.equal(grant.generation, 2n);
      assert.equal(Buffer.from(grant.permanent).toString(), 'P');
      assert.ok(grant.suspended);
      assert.equal(Buffer.from(grant.suspended.volatile).toString(), 'V');
      assert.deepEqual(Buffer.from(grant.suspended.referenceDigest), digest);
      assert.equal(grant.suspended.generation, 2n);
    }
    assert.deepEqual(audited(), [{ action: 'suspend', verdict: 'done', generation: 2n, facts }]);
  });

  it('the key that authenticates references is of the vTPM, and stays over loads and restarts', async () => {
    const worker = await manufactured();
    const keyOf = async (epoch: bigint) => (await next(worker, epoch)).grant.referenceKey;
    const first = await keyOf(1n);
    assert.equal(first?.length, 32);
    await world.restart();
    assert.deepEqual(await keyOf(2n), first);
    const other = await world.worker().load();
    assert.notDeepEqual(other.referenceKey, first);
  });

  for (const [action, name] of [
    ['RESTORE', 'resume'],
    ['TAKE_BACK', 'take-back'],
    ['DROP', 'drop'],
  ] as const) {
    it(`one save ends the suspension, and is written down: ${name}`, async () => {
      const worker = await manufactured();
      await worker.saveBody(suspend);
      assert.equal((await worker.saveBody(use(action))).generation, 3n);
      await assert.rejects(worker.saveBody(use(action)), refused('bad-request'));
      const { grant } = await next(worker, 1n);
      assert.equal(grant.suspended, undefined);
      assert.deepEqual(audited().slice(1), [{ action: name, verdict: 'done', generation: 3n, facts }]);
    });
  }

  it('a save that says nothing ends the suspension too: the TPM went on', async () => {
    const worker = await manufactured();
    await worker.saveBody(suspend);
    await worker.save('P2');
    assert.equal((await next(worker, 1n)).grant.suspended, undefined);
    assert.deepEqual(audited().slice(1), [{ action: 'take-back', verdict: 'done', generation: 3n, facts }]);
  });

  it('a ticket of a power-on alone drops the suspended state, and that is written down', async () => {
    const worker = await manufactured();
    await worker.saveBody(suspend);
    const { grant } = await next(worker, 1n, { verbs: ['COLD'] });
    assert.equal(grant.suspended, undefined);
    const load = world.audited.findLast(({ action }) => action === 'load');
    assert.equal(load?.facts?.suspended, 'dropped');
    assert.equal((await next(worker, 2n)).grant.suspended, undefined);
  });

  it('a suspending save whose acknowledgement was lost is one', async () => {
    const worker = await manufactured();
    await worker.saveBody(suspend);
    await world.restart();
    worker.session!.sequence = 2n;
    assert.equal((await worker.connect({})).committed, 2n);
    assert.equal((await worker.saveBody(suspend, 2n)).generation, 2n);
    assert.equal((await next(worker, 1n)).grant.suspended?.generation, 2n);
  });

  const misfits: [string, ManagerErrorCode, Partial<SaveBody>][] = [
    [
      'volatile state that nothing is said of',
      'bad-request',
      { permanent: Buffer.from('P'), volatile: Buffer.from('V') },
    ],
    ['volatile state beside another use', 'bad-request', use('EXPORT', { volatile: Buffer.from('V') })],
    ['a suspension without volatile state', 'bad-request', use('SUSPEND')],
    [
      'a suspension without permanent state',
      'bad-request',
      { volatile: Buffer.from('V'), use: { action: 'SUSPEND', digest } },
    ],
    ['empty volatile state', 'bad-request', use('SUSPEND', { volatile: Buffer.alloc(0) })],
    [
      'a digest of another length',
      'bad-request',
      use('EXPORT', { use: { action: 'EXPORT', digest: randomBytes(31) } }),
    ],
    ['the end of a suspension that is none', 'bad-request', use('RESTORE')],
  ];
  for (const [what, code, body] of misfits) {
    it(`refused, and nothing is changed: ${what}`, async () => {
      const worker = await manufactured(['MANUFACTURE', 'EXPORT', 'IMPORT']);
      await assert.rejects(worker.saveBody(body), refused(code));
      const { header } = await world.registry.view(worker.vtpm.id);
      assert.equal(header.generation, 1n);
      assert.deepEqual(header.marks, []);
      assert.deepEqual(audited(), []);
    });
  }

  it('the end of another suspension than the one there is is refused', async () => {
    const worker = await manufactured();
    await worker.saveBody(suspend);
    const other = use('RESTORE', { use: { action: 'RESTORE', digest: randomBytes(32) } });
    await assert.rejects(worker.saveBody(other), refused('bad-request'));
    assert.equal((await next(worker, 1n)).grant.suspended?.generation, 2n);
  });

  for (const [action, verb, mark] of [
    ['EXPORT', 'EXPORT', 'plain-export'],
    ['IMPORT', 'IMPORT', 'rolled-back'],
  ] as const) {
    const name = action.toLowerCase() as 'export' | 'import';

    it(`${name} needs its verb: refused by name, written down, and the state is as it was`, async () => {
      for (const verbs of [
        ['MANUFACTURE'],
        ['MANUFACTURE', verb === 'EXPORT' ? 'IMPORT' : 'EXPORT'],
      ] as Verb[][]) {
        const worker = await manufactured(verbs);
        await assert.rejects(worker.saveBody(use(action)), refused('verb-missing'));
        const { header } = await world.registry.view(worker.vtpm.id);
        assert.deepEqual([header.generation, header.marks], [1n, []]);
        const { action: what, verdict, reason } = world.audited.at(-1)!;
        assert.deepEqual([what, verdict, reason?.code], [name, 'refused', 'verb-missing']);
      }
    });

    it(`${name} with its verb is marked for ever, written down and counted by the TPM, also after a restart`, async () => {
      const worker = await manufactured(['MANUFACTURE', verb]);
      await world.restart();
      await worker.connect({});
      const counted = world.store.stated.counter;
      assert.equal((await worker.saveBody(use(action))).generation, 2n);
      assert.equal(world.store.stated.counter, counted + 1n);
      await worker.save('P3');
      assert.equal(world.store.stated.counter, counted + 1n, 'other saves are not');
      const { header } = await world.registry.view(worker.vtpm.id);
      assert.deepEqual(header.marks, [mark]);
      assert.deepEqual(audited(), [{ action: name, verdict: 'done', generation: 2n, facts }]);
      // A worker without the verb takes no mark away.
      const { worker: plain } = await next(worker, 1n);
      await plain.save('P4');
      assert.deepEqual((await world.registry.view(worker.vtpm.id)).header.marks, [mark]);
    });

    it(`the delegation must grant ${name}`, async () => {
      const worker = world.worker();
      const load = worker.load({
        verbs: ['MANUFACTURE', verb],
        delegatedVerbs: ['MANUFACTURE', 'COLD', 'RESUME'],
      });
      await assert.rejects(load, refused('ticket-forged'));
    });
  }

  it('who says it too often is not read for a while, and nobody else waits', async () => {
    const worker = await manufactured();
    const other = await manufactured();
    for (let count = 0; count < 32; count++) await worker.saveBody(suspend);
    let isRead = false;
    const paused = worker.saveBody(suspend).then(() => {
      isRead = true;
    });
    for (let count = 0; count < 3; count++) await other.saveBody(suspend);
    assert.equal(isRead, false);
    // It was answered: only what it says next has to wait.
    assert.equal(worker.lastAck().generation, 34n);
    void paused;
  });
});
