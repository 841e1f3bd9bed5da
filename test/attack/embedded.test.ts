import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { REPOSITORY } from '../support/installation.js';
import { Target } from './target.js';

const SAID =
  /nothing is hardware-protected, neither theft of the disk nor putting back an old one is noticed/;

/** What is not claimed, shown to be so: the embedded TPM's memory lies on the disk that is put back. */
describe('attack: an old disk with its embedded TPM is put back', () => {
  let target: Target;
  before(async () => {
    target = await Target.create({ tpm: 'embedded' });
  });
  after(() => target?.destroy());

  it('is taken, and each start, init and the documents say that it would be', async () => {
    await target.starts();
    assert.match(target.manager.stderr, SAID);
    const worker = await target.load();
    await worker.session.save({ permanent: Buffer.from('1') });
    await worker.close();
    await target.manager.stop();
    const old = target.keep();
    await target.starts();
    assert.match(target.manager.stderr, SAID);
    const again = await target.load(worker.vtpm, 1n);
    await again.session.save({ permanent: Buffer.from('2') });
    await again.close();
    await target.retire(again.vtpm);
    await target.manager.stop();

    target.putBack(old);
    const health = await target.starts();
    assert.equal((health.tpm as { hardwareProtected: boolean }).hardwareProtected, false);
    assert.match(target.manager.stderr, SAID);
    const { generation, kind } = await target.view(worker.vtpm);
    assert.deepEqual({ generation, kind }, { generation: 1, kind: 'live' });

    const model = readFileSync(join(REPOSITORY, 'docs/threat-model.md'), 'utf8').replaceAll(/\s+/g, ' ');
    assert.match(model, /A software TPM as the root\*\* \(`--tpm embedded`/);
    assert.match(model, /whoever has the disk has the root key\. Every start of the manager says so/);
  });

  it('I-5 the old disk without the embedded TPM is refused: there it counts as a chip does', async () => {
    await target.manager.stop('SIGKILL');
    const old = target.keep();
    await target.starts();
    await target.allowImage(Buffer.alloc(32, 9));
    await target.manager.stop();
    target.putBack(old, 'store');
    await target.refuses('rollback-detected', /the store is an old one/);
  });
});
