import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { copyFileSync, mkdirSync, symlinkSync } from 'node:fs';
import { join } from 'node:path';
import { endLeftovers } from 'vtpm-toolstack/supervisor/leftovers';
import { removeDirectory, temporaryDirectory } from './supervisor-fixture.js';

describe('what an earlier supervisor left', () => {
  it('I-3 is found without a ledger where the home is a symbolic link', async () => {
    const directory = temporaryDirectory();
    const root = join(directory, 'images', 'a', 'root');
    mkdirSync(root, { recursive: true });
    copyFileSync('/bin/sleep', join(root, 'sleep'));
    symlinkSync(directory, `${directory}.link`);
    const worker = spawn(join(root, 'sleep'), ['100'], { stdio: 'ignore' });
    const ended = once(worker, 'exit');
    try {
      assert.equal(await endLeftovers(join(directory, 'none'), [join(`${directory}.link`, 'images')]), 1);
      assert.deepEqual(await ended, [null, 'SIGKILL']);
    } finally {
      worker.kill('SIGKILL');
      removeDirectory(`${directory}.link`);
      removeDirectory(directory);
    }
  });
});
