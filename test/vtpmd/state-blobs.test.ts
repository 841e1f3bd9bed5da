import assert from 'node:assert/strict';
import { createHash } from 'node:crypto';
import { setImmediate as turn } from 'node:timers/promises';
import type { StateAction, Verb } from 'vtpm-proto';
import { MiniManager } from '../support/mini-manager.js';
import { refused } from '../support/refused.js';
import { BlobWorker, type Halves, type StartOptions } from '../support/state-blob-rig.js';
import {
  counterOf,
  getRandom,
  nvDefineCounter,
  nvIncrement,
  nvReadCounter,
  pcrExtend,
  pcrRead,
  responseCode,
  startAuthSession,
} from '../support/tpm-commands.js';
import { until } from '../support/until.js';

const INDEX = 0x01500001;
const PCR = 16;
const PLAIN: Verb[] = ['IMPORT', 'EXPORT'];
const digest = createHash('sha256').update('measured').digest();

describe('state blobs', () => {
  let manager: MiniManager;
  let worker: BlobWorker;
  beforeEach(() => {
    manager = new MiniManager();
  });
  afterEach(async () => {
    await worker.end();
    manager.stop();
  });

  async function start(options: StartOptions = {}): Promise<BlobWorker> {
    worker = await BlobWorker.start(manager, options);
    return worker;
  }

  /** A TPM that is on, with a counter and a PCR of its own. */
  async function measured(options: StartOptions = {}): Promise<BlobWorker> {
    await start(options);
    await worker.init();
    for (const command of [nvDefineCounter(INDEX), nvIncrement(INDEX), pcrExtend(PCR, digest)]) {
      assert.equal(responseCode(await worker.send(command)), 0);
    }
    return worker;
  }

  async function next(options: StartOptions = {}): Promise<BlobWorker> {
    await worker.kill();
    return start(options);
  }

  const pcr = async () => (await worker.send(pcrRead(PCR))).subarray(-32);
  const counter = async () => counterOf(await worker.send(nvReadCounter(INDEX)));
  const extended = createHash('sha256').update(Buffer.alloc(32)).update(digest).digest();
  const uses = (): (StateAction | undefined)[] => manager.saves.map(({ use }) => use?.action);

  describe('as references', () => {
    it('bring the TPM as it was into another worker, once, with another generator', async () => {
      await measured();
      const saves = manager.saves.length;
      const halves = await worker.takeOut();
      assert.deepEqual(uses().slice(saves), ['SUSPEND']);
      assert.equal(halves.permanent.length, 144);
      assert.ok(
        !Buffer.concat(manager.saves.map(({ permanent }) => permanent)).includes(
          halves.permanent.subarray(80, 112),
        ),
      );
      const randoms: string[] = [];
      for (const isFirst of [true, false]) {
        await next();
        if (isFirst) {
          worker.bringIn(halves);
          await worker.init();
          assert.deepEqual(await pcr(), extended);
          assert.equal(await counter(), 1n);
          assert.equal(uses().at(-1), 'RESTORE');
          randoms.push((await worker.send(getRandom())).toString('hex'));
        } else {
          assert.throws(() => worker.bringIn(halves), refused('reference-used'));
          await assert.rejects(worker.init(), refused('reference-used'));
          assert.equal(worker.tpm.power.isOn, false);
        }
      }
    });

    it('bring it back into the same worker, which a VMM stopped and goes on with', async () => {
      await measured();
      const halves = await worker.takeOut();
      await worker.stop();
      worker.bringIn(halves);
      await worker.init();
      assert.deepEqual(await pcr(), extended);
      await worker.stop();
      assert.throws(() => worker.bringIn(halves), refused('reference-used'));
    });

    it('freeze for a VMM and for a migration are one: no second save, and what ends the migration does not end the other', async () => {
      await measured();
      const halves = await worker.takeOut();
      const saves = manager.saves.length;
      for (const type of ['FREEZE', 'THAW'] as const) {
        const frozen = manager.next('FROZEN');
        manager.send(type, true);
        if (type === 'FREEZE') await frozen;
      }
      assert.deepEqual(await worker.takeOut(), halves);
      assert.equal(manager.saves.length, saves);
      assert.ok(worker.tpm.blobs.isFrozen);
    });

    it('give the same one until it is used, and there is none for TPM 1.2', async () => {
      await measured();
      const saves = manager.saves.length;
      const first = await worker.takeOut();
      assert.deepEqual(await worker.takeOut(), first);
      assert.equal(await worker.get('savestate'), undefined);
      assert.equal(manager.saves.length, saves + 1);
    });

    it('freeze the TPM: no door gets an answer, until the VMM sends a command and so takes it back', async () => {
      await measured();
      const halves = await worker.takeOut();
      assert.ok(worker.tpm.blobs.isFrozen);
      let answered = 0;
      const waiting = worker.send(pcrRead(PCR)).then(() => answered++);
      manager.holdSaves = true;
      const saved = manager.next('SAVE');
      const vmms = worker.send(nvIncrement(INDEX), 'vmm-data').then(() => answered++);
      await saved;
      assert.equal(answered, 0, 'that the reference is worthless is not durable yet');
      manager.release();
      await Promise.all([waiting, vmms]);
      assert.deepEqual(uses().slice(-2), ['TAKE_BACK', undefined]);
      assert.equal(worker.tpm.blobs.isFrozen, false);
      await worker.stop();
      assert.throws(() => worker.bringIn(halves), refused('reference-used'));
      await worker.stop();
      await worker.init();
      assert.equal(await counter(), 2n, 'nothing is lost');
    });

    it('LOCK_STORAGE takes it back; where nothing is out it does nothing', async () => {
      await measured();
      const saves = manager.saves.length;
      await worker.tpm.blobs.takeBack();
      assert.equal(manager.saves.length, saves);
      await worker.takeOut();
      await worker.tpm.blobs.takeBack();
      assert.deepEqual(uses().slice(saves), ['SUSPEND', 'TAKE_BACK']);
      assert.deepEqual(await pcr(), extended);
    });

    it('a power-on without it drops the suspended state, before it is answered', async () => {
      await measured();
      const halves = await worker.takeOut();
      await next();
      await worker.init();
      assert.equal(uses().at(-1), 'DROP');
      assert.deepEqual(await pcr(), Buffer.alloc(32));
      assert.equal(await counter(), 1n);
      await worker.stop();
      assert.throws(() => worker.bringIn(halves), refused('reference-used'));
    });

    it('a worker that powers its TPM on by itself drops it too', async () => {
      await measured();
      await worker.takeOut();
      await next({ power: 'on' });
      assert.ok(uses().includes('DROP'));
      assert.deepEqual(await pcr(), Buffer.alloc(32));
    });

    it('only one half, or a wrong one, powers nothing on, until the VMM stops the TPM', async () => {
      await measured();
      const halves = await worker.takeOut();
      await worker.stop();
      worker.tpm.blobs.bringIn('permanent', halves.permanent);
      await assert.rejects(worker.init(), refused('blob-incomplete'));
      await worker.stop();
      const flipped = Buffer.from(halves.permanent);
      flipped[100] = (flipped[100] ?? 0) ^ 1;
      assert.throws(() => worker.tpm.blobs.bringIn('permanent', flipped), refused('blob-malformed'));
      assert.throws(() => worker.bringIn(halves), refused('blob-malformed'));
      await assert.rejects(worker.init(), refused('blob-malformed'));
      await worker.stop();
      worker.bringIn(halves);
      await worker.init();
      assert.deepEqual(await pcr(), extended);
    });

    it('a stop of the worker while it is frozen sends no Shutdown: the reference stays good', async () => {
      await measured();
      const halves = await worker.takeOut();
      const saves = manager.saves.length;
      await worker.stop();
      assert.equal(manager.saves.length, saves);
      await next();
      worker.bringIn(halves);
      await worker.init();
      assert.deepEqual(await pcr(), extended);
    });

    it('are not given out while the manager is away: the VM goes on', async () => {
      await measured();
      manager.cut();
      await until('the loss of the link is known', () => worker.tpm.queue.isOutage);
      await assert.rejects(worker.takeOut(), refused('manager-away'));
      assert.equal(worker.tpm.blobs.isFrozen, false);
    });

    it('a stop is refused where a taking-back does not end, because the manager is away', async () => {
      await measured();
      await worker.takeOut();
      manager.cut();
      await until('the loss of the link is known', () => worker.tpm.queue.isOutage);
      const takenBack = worker.tpm.blobs.takeBack();
      await assert.rejects(worker.stop(), refused('manager-away'));
      worker.relink();
      await takenBack;
      await worker.stop();
      assert.equal(worker.tpm.power.isOn, false);
    });

    it('a VMM without the verbs brings in no state in the clear', async () => {
      await measured({ verbs: PLAIN });
      const plain = await worker.takeOut();
      await next();
      assert.throws(() => worker.bringIn(plain), refused('plain-forbidden'));
      await assert.rejects(worker.init(), refused('plain-forbidden'));
    });
  });

  describe('in the clear', () => {
    it('are exported as one moment of the TPM, saved and marked before they are given out, and the TPM goes on', async () => {
      await measured({ verbs: PLAIN });
      const saves = manager.saves.length;
      const permanent = await worker.get('permanent');
      assert.deepEqual(uses().slice(saves), ['EXPORT']);
      await worker.send(nvIncrement(INDEX), 'vmm-data');
      await worker.send(pcrExtend(PCR, digest), 'vmm-data');
      const volatile = await worker.get('volatile');
      assert.deepEqual(uses().slice(saves), ['EXPORT', undefined], 'one export');
      await next({ verbs: PLAIN });
      worker.bringIn({ permanent: permanent!, volatile: volatile! });
      await worker.init();
      assert.deepEqual(await pcr(), extended);
      assert.equal(await counter(), 1n);
      assert.equal(uses().at(-1), 'IMPORT');
    });

    it('the next export is another one', async () => {
      await measured({ verbs: PLAIN });
      const first = await worker.takeOut();
      await worker.send(nvIncrement(INDEX));
      const second = await worker.takeOut();
      assert.notDeepEqual(first.permanent, second.permanent);
      assert.equal(uses().filter((use) => use === 'EXPORT').length, 2);
    });

    it('two restores of one state give different random bytes and nonces', async () => {
      await measured({ verbs: PLAIN });
      const halves = await worker.takeOut();
      const seen: string[] = [];
      for (const _ of [1, 2]) {
        await next({ verbs: PLAIN });
        worker.bringIn(halves);
        await worker.init();
        const session = await worker.send(startAuthSession());
        seen.push((await worker.send(getRandom())).toString('hex'), session.subarray(-32).toString('hex'));
      }
      assert.equal(new Set(seen).size, 4);
    });

    it('permanent state alone is a power-on with it', async () => {
      await measured({ verbs: PLAIN });
      const { permanent } = await worker.takeOut();
      await worker.send(nvIncrement(INDEX));
      await worker.stop();
      worker.tpm.blobs.bringIn('permanent', permanent);
      await worker.init();
      assert.deepEqual(await pcr(), Buffer.alloc(32));
      assert.equal(await counter(), 1n, 'the old state is the newest now');
      assert.equal(uses().at(-1), 'IMPORT');
    });

    it('what is imported is durable before the power-on is answered', async () => {
      await measured({ verbs: PLAIN });
      const halves = await worker.takeOut();
      await worker.send(nvIncrement(INDEX));
      await worker.stop();
      worker.bringIn(halves);
      manager.holdSaves = true;
      let isAnswered = false;
      const saved = manager.next('SAVE');
      const init = worker.init().then(() => {
        isAnswered = true;
      });
      await saved;
      assert.equal(isAnswered, false);
      manager.release();
      await init;
      await next();
      await worker.init();
      assert.equal(await counter(), 1n);
    });
  });

  describe('I-4 a manager that is killed', () => {
    for (const isCommitted of [true, false]) {
      const when = isCommitted ? 'before it says that it has the save' : 'before it has the save';

      /** The save comes to it, it dies, and is there again. */
      async function killAtSave<T>(begin: () => Promise<T>): Promise<T> {
        if (isCommitted) manager.holdAcks = true;
        else manager.holdSaves = true;
        const saved = manager.next('SAVE');
        const result = begin();
        await saved;
        await turn();
        manager.cut();
        manager.holdAcks = manager.holdSaves = false;
        await until('the loss of the link is known', () => worker.tpm.queue.isOutage);
        worker.relink();
        return await result;
      }

      it(`${when}: what is taken out and brought in is one, used once`, async () => {
        await measured();
        const permanent = await killAtSave(() => worker.get('permanent'));
        const volatile = await worker.get('volatile');
        const halves: Halves = { permanent: permanent!, volatile: volatile! };
        await next();
        worker.bringIn(halves);
        await killAtSave(() => worker.init());
        assert.deepEqual(await pcr(), extended);
        assert.deepEqual(
          uses().filter((use) => use !== undefined),
          ['SUSPEND', 'RESTORE'],
        );
        await worker.takeOut();
        await killAtSave(() => worker.tpm.blobs.takeBack());
        assert.deepEqual(await pcr(), extended);
        await worker.stop();
        assert.throws(() => worker.bringIn(halves), refused('reference-used'));
      });
    }
  });

  describe('I-4 a worker that is killed', () => {
    /** At which Save it dies, and whether the manager has that. */
    const moments = [
      ['before its save is committed', false],
      ['behind that, before it hears so', true],
    ] as const;

    async function killAtSave(isCommitted: boolean, begin: () => Promise<unknown>): Promise<void> {
      if (isCommitted) manager.holdAcks = true;
      else manager.holdSaves = true;
      const saved = manager.next('SAVE');
      begin().catch(() => undefined);
      await saved;
      const { run } = worker;
      await worker.kill();
      manager.cut();
      manager.holdAcks = manager.holdSaves = false;
      await start({ run });
    }

    for (const [when, isCommitted] of moments) {
      it(`at a taking-out, ${when}: the TPM goes on, and is frozen exactly if it is suspended`, async () => {
        await measured();
        await killAtSave(isCommitted, () => worker.takeOut());
        assert.equal(worker.tpm.blobs.isFrozen, isCommitted);
        // The VMM that got no answer asks again, and goes elsewhere.
        const halves = await worker.takeOut();
        await next();
        worker.bringIn(halves);
        await worker.init();
        assert.deepEqual(await pcr(), extended);
      });

      it(`at a taking-back, ${when}: it is frozen exactly if the reference is good`, async () => {
        await measured();
        const halves = await worker.takeOut();
        await killAtSave(isCommitted, () => worker.tpm.blobs.takeBack());
        assert.equal(worker.tpm.blobs.isFrozen, !isCommitted);
        if (isCommitted) assert.deepEqual(await pcr(), extended);
        await next();
        if (isCommitted) {
          assert.throws(() => worker.bringIn(halves), refused('reference-used'));
        } else {
          worker.bringIn(halves);
          await worker.init();
          assert.deepEqual(await pcr(), extended);
        }
      });

      it(`at a bringing-in, ${when}: the state is restored once, and nothing is lost`, async () => {
        await measured();
        const halves = await worker.takeOut();
        await next();
        worker.bringIn(halves);
        await killAtSave(isCommitted, () => worker.init());
        assert.equal(worker.tpm.power.isOn, isCommitted);
        // What was brought in is known to the next worker.
        if (!isCommitted) await worker.init();
        assert.deepEqual(await pcr(), extended);
        assert.equal(uses().filter((use) => use === 'RESTORE').length, 1);
        await worker.stop();
        assert.throws(() => worker.bringIn(halves), refused('reference-used'));
      });
    }

    it('at the taking-back that a command of its VMM began meanwhile: the TPM goes on', async () => {
      await measured();
      manager.holdSaves = true;
      const suspending = manager.next('SAVE');
      const taken = worker.get('permanent');
      await suspending;
      worker.send(pcrRead(PCR), 'vmm-data').catch(() => undefined);
      const takingBack = manager.next('SAVE');
      manager.release();
      manager.holdSaves = true;
      await Promise.all([taken, takingBack]);
      const { run } = worker;
      await worker.kill();
      manager.cut();
      manager.holdSaves = false;
      await start({ run });
      assert.ok(worker.tpm.blobs.isFrozen);
      await worker.tpm.blobs.takeBack();
      assert.deepEqual(await pcr(), extended);
    });

    it('frozen: no command of its successor runs, because what that stores would end the suspension', async () => {
      await measured();
      await worker.takeOut();
      await worker.kill();
      const hooks = globalThis as Record<symbol, unknown>;
      const hook = Symbol.for('vtpm.barrier');
      const passed: string[] = [];
      hooks[hook] = (name: string) => passed.push(name);
      try {
        await start({ run: worker.run });
      } finally {
        delete hooks[hook];
      }
      assert.ok(passed.includes('half-checkpoint'));
      assert.ok(!passed.includes('before-process'), passed.join(' '));
    });

    it('more than once, frozen: each that goes on has another generator', async () => {
      await measured();
      await worker.takeOut();
      const { run } = worker;
      const memory = run.image();
      const random: string[] = [];
      for (let life = 0; life < 2; life++) {
        await worker.kill();
        run.put(memory);
        await start({ run });
        assert.ok(worker.tpm.blobs.isFrozen);
        await worker.tpm.blobs.takeBack();
        random.push((await worker.send(getRandom())).toString('hex'));
        // As if that had not been committed.
        manager.saves.pop();
      }
      assert.notEqual(random[0], random[1]);
    });

    it('between the two halves, or with the TPM frozen, is not noticed', async () => {
      await measured();
      const permanent = await worker.get('permanent');
      await worker.kill();
      await start({ run: worker.run });
      assert.ok(worker.tpm.blobs.isFrozen);
      const volatile = await worker.get('volatile');
      const halves: Halves = { permanent: permanent!, volatile: volatile! };
      await next();
      worker.tpm.blobs.bringIn('permanent', halves.permanent);
      await worker.kill();
      await start({ run: worker.run });
      worker.tpm.blobs.bringIn('volatile', halves.volatile);
      await worker.kill();
      await start({ run: worker.run });
      await worker.init();
      assert.deepEqual(await pcr(), extended);
    });
  });
});
