import assert from 'node:assert/strict';
import { execFile } from 'node:child_process';
import { join } from 'node:path';
import { promisify } from 'node:util';
import { cleanEnvironment, REPOSITORY } from '../support/installation.js';

describe('npm run quickstart', () => {
  it('shows each of its steps, and leaves nothing running', async () => {
    const { stdout } = await promisify(execFile)(
      process.execPath,
      [join(REPOSITORY, 'quickstart/dist/main.js')],
      { env: cleanEnvironment() },
    );
    const steps = [...stdout.matchAll(/^ {2}(\d)\. /gm)].map(([, number]) => Number(number));
    assert.deepEqual(steps, [1, 2, 3, 4, 5, 6]);
    assert.match(stdout, /the same connection, now to process \d+: counter 4, /);
    assert.match(stdout, /the manager refuses: \S/);
    assert.match(stdout, /Done in [\d.]+ s; nothing is left running/);
  });
});
