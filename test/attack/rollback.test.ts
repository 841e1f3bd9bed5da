import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { cpSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import type { TestVtpm } from '../support/worker-client.js';
import { keyOf, type RawRecord, refusedBecause, Target } from './target.js';

/** mdb.c, struct MDB_page: number, pad, flags, bounds. */
const PAGE_HEADER = 16;
const PAGE = 4096;
const OLD_STORE = /the store is an old one: its anchor says \d+, the TPM has counted to \d+/;
const NOT_WHAT_WAS_WRITTEN = /the store is not what was last written/;
const ANOTHER_KEY = /its anchor was not written by this installation's TPM key/;

/**
 * Who controls the disk puts back what he has copied before. Each of it is refused by its name, at every start again, and
 * the newest disk, put in place by the same means, starts whole.
 */
describe('attack: an old disk, or a part of one, is put back while the manager is stopped', () => {
  let target: Target;
  let [web, mail, gone]: TestVtpm[] = [];
  const withdrawn = randomBytes(32);
  /** The disk before what a rollback is to undo, and the newest one. */
  let [old, newest]: string[] = [];

  before(async () => {
    target = await Target.create();
    await target.starts();
    web = await target.vtpm('web 1', 'web 2');
    mail = await target.vtpm('mail 1');
    gone = await target.vtpm('gone 1');
    await target.allowImage(withdrawn);
    assert.equal(await target.manager.stop(), 0);
    old = target.keep();

    await target.starts();
    const worker = await target.load(web, 1n);
    await worker.session.save({ permanent: Buffer.from('web 3') });
    await worker.close();
    await target.retire(gone!);
    const removed = await target.manager.admin('DELETE', `/images/${withdrawn.toString('hex')}`);
    assert.equal(removed.status, 200);
    assert.equal(await target.manager.stop(), 0);
    newest = target.keep();
  });
  afterEach(() => target.manager.stop('SIGKILL'));
  after(async () => {
    await target?.destroy();
    await target?.tpm?.stop();
  });

  /** Refused, whatever is tried again; and the newest disk starts with all that it had. */
  async function isRefused(code: string, message: RegExp): Promise<void> {
    await target.refuses(code, message);
    target.putBack(newest!);
    await target.starts();
    assert.equal((await target.view(web!)).generation, 3);
    assert.equal((await target.view(gone!)).kind, 'retired');
    await target.manager.stop('SIGKILL');
    target.putBack(newest!);
  }

  /** Ends the manager at once. What it leaves is the newest disk from now on. */
  async function kill(): Promise<void> {
    await target.manager.stop('SIGKILL');
    newest = target.keep();
  }

  const put = (key: string, { value, version }: RawRecord): void => {
    target.tamper((db) => db.putSync(key, value, version));
  };

  it('I-5 the whole old disk, after a clean stop', async () => {
    target.putBack(old!);
    await target.refuses('rollback-detected', OLD_STORE);
    await isRefused('rollback-detected', OLD_STORE);
  });

  it('I-5 the whole old disk, after kill -9', async () => {
    await target.starts();
    await target.vtpm('new 1');
    await kill();
    target.putBack(old!);
    await isRefused('rollback-detected', OLD_STORE);
  });

  it('I-5 the old store alone, under the newest enrolment and audit log', async () => {
    target.putBack(old!, 'store');
    await isRefused('rollback-detected', OLD_STORE);
  });

  it('I-5 one old record in the new store', async () => {
    put(keyOf(web!), target.record(keyOf(web!), old));
    await isRefused('rollback-detected', NOT_WHAT_WAS_WRITTEN);
  });

  it('I-5 an old record under its new version', async () => {
    const { version } = target.record(keyOf(web!));
    put(keyOf(web!), { value: target.record(keyOf(web!), old).value, version });
    await isRefused('rollback-detected', NOT_WHAT_WAS_WRITTEN);
  });

  it('I-5 a record under the uuid of another vTPM', async () => {
    const { version } = target.record(keyOf(mail!));
    put(keyOf(mail!), { value: target.record(keyOf(web!)).value, version });
    await isRefused('rollback-detected', NOT_WHAT_WAS_WRITTEN);
  });

  it('I-5 a record under a uuid that there was not', async () => {
    put('vtpm/00000000-0000-4000-8000-000000000000', target.record(keyOf(web!)));
    await isRefused('rollback-detected', NOT_WHAT_WAS_WRITTEN);
  });

  it('I-9 a record taken away, so that its vTPM would be made anew', async () => {
    target.tamper((db) => db.removeSync(keyOf(web!)));
    await isRefused('rollback-detected', NOT_WHAT_WAS_WRITTEN);
  });

  it('I-5 the commit before the last one, by the other of the two meta pages of the file', async () => {
    const file = join(target.manager.paths.store, 'data.mdb');
    await target.starts();
    assert.equal(await target.manager.stop(), 0);
    newest = target.keep();
    const outcomes: string[] = [];
    for (const from of [0, 1]) {
      const bytes = readFileSync(file);
      // Behind the page's header: LMDB takes the one with the higher number of its transaction.
      bytes.copy(bytes, (1 - from) * PAGE + PAGE_HEADER, from * PAGE + PAGE_HEADER, (from + 1) * PAGE);
      writeFileSync(file, bytes);
      try {
        await target.starts();
        assert.equal((await target.view(web!)).generation, 3);
        outcomes.push('the newest');
        await target.manager.stop('SIGKILL');
      } catch (error) {
        assert.match((error as Error).message, OLD_STORE);
        outcomes.push('refused');
      }
      target.putBack(newest!);
    }
    assert.deepEqual(outcomes.sort(), ['refused', 'the newest']);
  });

  it('I-5 a retired vTPM: its old record', async () => {
    put(keyOf(gone!), target.record(keyOf(gone!), old));
    await isRefused('rollback-detected', NOT_WHAT_WAS_WRITTEN);
  });

  it('I-5 a retired vTPM: the disk from right before, after kill -9', async () => {
    await target.starts();
    const last = await target.vtpm('last 1');
    const before = target.keep();
    await target.retire(last);
    await kill();
    target.putBack(before);
    await isRefused('rollback-detected', OLD_STORE);
  });

  it('I-5 the disk from right before a restore, after kill -9', async () => {
    await target.starts();
    const back = await target.vtpm('back 1');
    const { restore } = await target.backup(back);
    const worker = await target.load(back, 1n);
    await worker.session.save({ permanent: Buffer.from('back 2') });
    await worker.close();
    const before = target.keep();
    await restore();
    assert.deepEqual((await target.view(back)).marks, ['restored']);
    await kill();
    target.putBack(before);
    await isRefused('rollback-detected', OLD_STORE);
  });

  it('I-5 the anchor taken away', async () => {
    target.tamper((db) => db.removeSync('anchor'));
    await isRefused('store-corrupt', /its anchor was removed/);
  });

  it('I-5 an old anchor in the new store', async () => {
    put('anchor', target.record('anchor', old));
    await isRefused('rollback-detected', NOT_WHAT_WAS_WRITTEN);
  });

  it('I-5 an old anchor with the old records, and a new version', async () => {
    const { version } = target.record('anchor');
    target.putBack(old!, 'store');
    put('anchor', { value: target.record('anchor').value, version });
    await isRefused('rollback-detected', OLD_STORE);
  });

  it('I-5 the list of images that are allowed, with one that was withdrawn', async () => {
    put('trust', target.record('trust', old));
    await isRefused('rollback-detected', NOT_WHAT_WAS_WRITTEN);
  });

  it('I-5 the disk from right before an image was withdrawn, after kill -9', async () => {
    await target.starts();
    await target.allowImage(withdrawn);
    const before = target.keep();
    await target.manager.admin('DELETE', `/images/${withdrawn.toString('hex')}`);
    await kill();
    target.putBack(before);
    await isRefused('rollback-detected', OLD_STORE);
  });

  it('I-5 the old audit log', async () => {
    target.putBack(old!, 'audit');
    await isRefused('audit-corrupt', /entry \d+ is missing/);
  });

  it('I-5 the audit log without its last entry', async () => {
    await target.starts();
    await (await target.load()).close();
    assert.equal(await target.manager.stop(), 0);
    newest = target.keep();
    const lines = readFileSync(target.manager.paths.audit, 'latin1').split('\n').slice(0, -1);
    writeFileSync(target.manager.paths.audit, `${lines.slice(0, -1).join('\n')}\n`, 'latin1');
    await isRefused('audit-corrupt', /entry \d+ is missing/);
  });

  it('I-5 the audit log without the entries of a run in which nothing was saved', async () => {
    await target.starts();
    await assert.rejects(target.load(gone, 1n), refusedBecause('retired'));
    assert.equal(await target.manager.stop(), 0);
    const after = target.keep();
    target.putBack(newest!, 'audit');
    newest = after;
    await isRefused('audit-corrupt', /entry \d+ is missing/);
  });

  it('I-5 the audit log with an entry rewritten, or none at all', async () => {
    const { audit } = target.manager.paths;
    const text = readFileSync(audit, 'latin1');
    writeFileSync(audit, text.replace('"retire"', '"resume"'), 'latin1');
    await target.refuses('audit-corrupt', /was changed or damaged: entry \d+/);
    rmSync(audit);
    await isRefused('audit-corrupt', /entry \d+ is missing, as is the whole log/);
  });

  it('I-5 the anchor, a record, the whole store and the audit log of another installation on the same TPM', async () => {
    const other = await Target.create({ tpm: target.tpm! });
    try {
      await other.starts();
      const foreign = await other.vtpm('foreign 1');
      assert.equal(await other.manager.stop(), 0);
      const disk = other.keep();

      put('anchor', other.record('anchor'));
      await isRefused('store-corrupt', ANOTHER_KEY);
      put(keyOf(foreign), other.record(keyOf(foreign)));
      await isRefused('rollback-detected', NOT_WHAT_WAS_WRITTEN);
      rmSync(target.manager.paths.store, { recursive: true });
      cpSync(join(disk, 'store'), target.manager.paths.store, { recursive: true });
      await isRefused('store-corrupt', ANOTHER_KEY);
      cpSync(join(disk, 'audit.log'), target.manager.paths.audit);
      await isRefused('audit-corrupt', /entry 1 was not written under this installation's key/);
      // Positive control: in its own place all of it is taken.
      await other.starts();
      assert.equal((await other.view(foreign)).generation, 1);
    } finally {
      await other.destroy();
    }
  });

  it('positive control: what was put in place by the same means, and is the newest, is taken', async () => {
    put(keyOf(web!), target.record(keyOf(web!), newest));
    put('anchor', target.record('anchor', newest));
    target.putBack(newest!, 'audit');
    target.putBack(newest!, 'enrolment');
    await target.starts();
    const worker = await target.load(web, 2n);
    assert.equal(worker.permanent, 'web 3');
    await worker.close();
    await assert.rejects(target.load(gone, 1n), refusedBecause('retired'));
  });
});
