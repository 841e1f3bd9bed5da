import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { cpSync, renameSync } from 'node:fs';
import { join } from 'node:path';
import { storeProcesses } from '../support/store-processes.js';
import { until } from '../support/until.js';
import { refusedBecause, Target } from './target.js';

const OLD_STORE = /the store is an old one: its anchor says \d+, the TPM has counted to \d+/;

describe('attack: what was saved last is put back after an unclean stop', () => {
  let target: Target;
  before(async () => {
    target = await Target.create({ anchorWindow: 3600 });
  });
  afterEach(() => target.manager.stop('SIGKILL'));
  after(async () => {
    await target?.destroy();
    await target?.tpm?.stop();
  });

  it('I-5 plain saves go back by one window at most, and the worker that was told of them notices', async () => {
    await target.starts();
    const worker = await target.load();
    const { session, vtpm } = worker;
    const save = (text: string) => session.save({ permanent: Buffer.from(text) });
    await save('1');
    const before = target.keep();
    // Counts, as the end of a window does.
    await target.allowImage(randomBytes(32));
    await save('2');
    const inWindow = target.keep();
    await save('3');
    await target.manager.stop('SIGKILL');
    const newest = target.keep();

    target.putBack(before);
    await target.refuses('rollback-detected', OLD_STORE);
    // What the promise leaves open, to who controls the disk after an unclean stop.
    assert.equal(target.stated(inWindow), target.stated(newest), 'both are of one window');
    target.putBack(inWindow);
    await target.starts();
    assert.equal((await target.view(vtpm)).generation, 2);
    const again = target.manager.worker(target.managerId);
    await assert.rejects(
      session.connect(again.openStream()),
      refusedBecause('rollback-detected', /has an acknowledgement of save 3, the store ends at 2/),
    );
    again.close();
    await target.manager.stop('SIGKILL');
    target.putBack(newest);
    await target.starts();
    assert.equal((await target.view(vtpm)).generation, 3);
    await worker.close();
  });

  for (const [what, event] of [
    ['a retirement', (id: string) => target.manager.admin('POST', `/vtpms/${id}/retire`)],
    ['a change of trust', () => target.allowImage(Buffer.alloc(32, 7))],
  ] as const) {
    it(`I-5 ${what} in the same window refuses all from before it`, async () => {
      await target.starts();
      const other = await target.vtpm('other 1');
      const worker = await target.load();
      await worker.session.save({ permanent: Buffer.from('1') });
      const before = target.keep();
      const stated = target.stated();
      await event(other.id);
      assert.equal(target.stated(), stated + 1n);
      await target.manager.stop('SIGKILL');
      const newest = target.keep();
      target.putBack(before);
      await target.refuses('rollback-detected', OLD_STORE);
      target.putBack(newest);
      await target.starts();
      assert.equal((await target.view(worker.vtpm)).generation, 1);
      await worker.close();
    });
  }

  it('I-5 a clean stop leaves no window', async () => {
    await target.starts();
    const worker = await target.load();
    await worker.session.save({ permanent: Buffer.from('1') });
    const before = target.keep();
    await worker.session.save({ permanent: Buffer.from('2') });
    await worker.close();
    assert.equal(await target.manager.stop(), 0);
    const newest = target.keep();
    target.putBack(before);
    await target.refuses('rollback-detected', OLD_STORE);
    target.putBack(newest);
    await target.starts();
    assert.equal((await target.view(worker.vtpm)).generation, 2);
  });
});

describe('attack: a disk from before the last window is put back after an unclean stop', () => {
  let target: Target;
  before(async () => {
    target = await Target.create({ anchorWindow: 1 });
  });
  after(async () => {
    await target?.destroy();
    await target?.tpm?.stop();
  });

  it('I-5 is refused: the TPM counts by itself', async () => {
    await target.starts();
    const worker = await target.load();
    const save = (text: string) => worker.session.save({ permanent: Buffer.from(text) });
    await save('1');
    const before = target.keep();
    // The anchor is written before the TPM counts: when the second one is there, the first was counted.
    for (const text of ['2', '3']) {
      const stated = target.stated();
      await save(text);
      await until('the window is over', () => target.stated() > stated);
    }
    await target.manager.stop('SIGKILL');
    const newest = target.keep();
    target.putBack(before);
    await target.refuses('rollback-detected', OLD_STORE);
    target.putBack(newest);
    await target.starts();
    assert.equal((await target.view(worker.vtpm)).generation, 3);
    await worker.close();
  });
});

describe('attack: an old store is put in place while the manager runs, and the store process killed', () => {
  let target: Target;
  before(async () => {
    // Within one window, so that the TPM does not tell the two apart.
    target = await Target.create({ anchorWindow: 3600 });
  });
  after(async () => {
    await target?.destroy();
    await target?.tpm?.stop();
  });

  it('I-5 is refused although the TPM has not counted, and the same store is served again', async () => {
    await target.starts();
    const { store } = target.manager.paths;
    const file = join(store, 'data.mdb');
    const worker = await target.load();
    await worker.session.save({ permanent: Buffer.from('1') });
    const old = join(target.keep(), 'store', 'data.mdb');
    await worker.session.save({ permanent: Buffer.from('2') });
    const newest = join(target.keep(), 'store', 'data.mdb');
    const exchange = (copy: string): void => {
      cpSync(copy, `${file}.new`);
      renameSync(`${file}.new`, file);
      for (const pid of storeProcesses(store)) {
        try {
          process.kill(pid, 'SIGKILL');
        } catch {
          // bubblewrap takes along what it runs.
        }
      }
    };
    const status = async () => (await target.manager.admin('GET', '/health')).body;

    exchange(newest);
    await until('the store is open again', () => target.manager.stderr.includes('is open again'));
    assert.equal(
      (await status()).status,
      'ready',
      'positive control: this is how the newest one is put in place',
    );
    assert.equal((await target.view(worker.vtpm)).generation, 2);

    exchange(old);
    const locked = await until('the manager has refused it', async () => {
      const health = await status();
      return health.reason === 'rollback-detected' ? health : undefined;
    });
    assert.equal(locked.status, 'locked');
    assert.match(String(locked.message), /put back to an older state while the manager was running/);
    await assert.rejects(target.load(worker.vtpm, 1n), refusedBecause('locked', /rollback-detected/));
  });
});
