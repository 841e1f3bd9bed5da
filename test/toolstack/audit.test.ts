import assert from 'node:assert/strict';
import { existsSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { Installation } from '../support/installation.js';

const DIGEST = 'ef'.repeat(32);

describe('vtpmctl audit', () => {
  let installation: Installation;
  before(async () => {
    installation = await Installation.create({ tpm: 'embedded' });
    await installation.startManager();
    await installation.admin('POST', '/images', { digest: DIGEST, note: 'for a test' });
  });
  after(() => installation.destroy());

  it('tail shows who did what, with which outcome', async () => {
    await installation.admin('DELETE', `/images/${'00'.repeat(32)}`);
    const { code, stdout } = await installation.ctl('audit', 'tail', '-n', '3');
    assert.equal(code, 0);
    const [, ...rows] = stdout.trimEnd().split('\n');
    assert.equal(rows.length, 3);
    const uid = process.getuid?.();
    assert.match(rows[1] ?? '', new RegExp(`uid ${uid} +image-remove +intended`));
    assert.match(
      rows[2] ?? '',
      new RegExp(`uid ${uid} +image-remove +refused .*is not on the list.*\\(unknown-image\\)`),
    );
    assert.equal((await installation.ctl('audit', 'tail', '-n', '1001')).code, 2);
  });

  it('export writes the lines of the log, whole or not at all', async () => {
    const log = readFileSync(installation.paths.manager.audit, 'utf8');
    const file = join(installation.directory, 'audit.jsonl');
    const { code, stdout } = await installation.ctl('audit', 'export', '-o', file);
    assert.deepEqual([code, stdout], [0, `written  ${file}\n`]);
    assert.equal(readFileSync(file, 'utf8'), log);
    const part = await installation.ctl('audit', 'export', '--from', '1', '--to', '1');
    assert.equal(part.stdout, `${log.split('\n')[0]}\n`);
    const none = join(installation.directory, 'none.jsonl');
    assert.equal((await installation.ctl('audit', 'export', '--from', '9999', '-o', none)).code, 1);
    assert.ok(!existsSync(none) && !existsSync(`${none}.part`));
    assert.equal((await installation.ctl('audit', 'export', '--from', 'x')).code, 2);
    assert.equal((await installation.ctl('audit', 'export', '-o', '/nowhere/x')).code, 1);
  });

  it('verify ends with 1 where an entry was changed, with the manager running or stopped', async () => {
    const { audit } = installation.paths.manager;
    const whole = await installation.ctl('audit', 'verify');
    assert.equal(whole.code, 0, whole.stderr);
    assert.match(whole.stdout, /^verdict +whole\nentries +1 to (\d+), \1 of them by MAC too\n$/);
    const good = readFileSync(audit, 'utf8');
    writeFileSync(audit, good.replace(DIGEST, DIGEST.replace('e', 'a')));
    const forged = await installation.ctl('audit', 'verify');
    assert.equal(forged.code, 1);
    assert.match(forged.stdout, /^verdict +DAMAGED: entry \d+ of /);
    await installation.stopDaemons();
    const stopped = await installation.ctl('audit', 'verify', '--json');
    assert.equal(stopped.code, 1, stopped.stderr);
    const verdict = JSON.parse(stopped.stdout) as { checked: string; isWhole: boolean };
    assert.deepEqual([verdict.checked, verdict.isWhole], ['anchor', false]);
  });
});
