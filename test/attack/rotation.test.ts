import assert from 'node:assert/strict';
import { cpSync, rmSync } from 'node:fs';
import { join } from 'node:path';
import type { TestVtpm } from '../support/worker-client.js';
import { keyOf, Target } from './target.js';

const ERASED = /which holds a half of the root key, is gone: it was removed or the TPM was cleared/;

describe('attack: what is from before a rotation of the root key is put back', () => {
  let target: Target;
  let web: TestVtpm;
  let [old, newest]: string[] = [];

  before(async () => {
    target = await Target.create();
    await target.starts();
    web = await target.vtpm('web 1');
    assert.equal(await target.manager.stop(), 0);
    old = target.keep();
    await target.starts();
    assert.equal((await target.platform('rotations', {})).generation, 2);
    assert.equal(await target.manager.stop(), 0);
    newest = target.keep();
  });
  afterEach(() => target.manager.stop('SIGKILL'));
  after(async () => {
    await target?.destroy();
    await target?.tpm?.stop();
  });

  async function isRefused(code: string, message: RegExp): Promise<void> {
    await target.refuses(code, message);
    target.putBack(newest!);
    await target.starts();
    assert.equal((await target.view(web)).generation, 1);
    await target.manager.stop('SIGKILL');
    target.putBack(newest!);
  }

  it('I-5 I-6 the whole disk: the half that opened it is overwritten in the TPM', async () => {
    target.putBack(old!);
    await isRefused('tpm-emptied', ERASED);
  });

  it('I-5 I-6 the enrolment alone', async () => {
    target.putBack(old!, 'enrolment');
    await isRefused('tpm-emptied', ERASED);
  });

  it('I-5 the store under the new enrolment', async () => {
    target.putBack(old!, 'store');
    await isRefused('rollback-detected', /its anchor is from before the last rotation of the root key/);
  });

  it('I-5 one record', async () => {
    const { value, version } = target.record(keyOf(web), old);
    target.tamper((db) => db.putSync(keyOf(web), value, version));
    await isRefused('rollback-detected', /the store is not what was last written/);
  });

  it('I-5 I-6 an old enrolment as the one that a rotation is about to make', async () => {
    cpSync(join(old!, 'enrolment.json'), `${target.manager.paths.enrolment}.next`);
    await isRefused('tpm-emptied', ERASED);
    rmSync(`${target.manager.paths.enrolment}.next`, { force: true });
  });

  it('I-5 the audit log', async () => {
    target.putBack(old!, 'audit');
    await isRefused('audit-corrupt', /entry \d+ is missing: the log ends with entry \d+/);
  });
});
