import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { appendFileSync, copyFileSync, mkdirSync, statSync, symlinkSync } from 'node:fs';
import { join } from 'node:path';
import { createLogger } from 'vtpm-common';
import { endLeftovers, WorkerLedger } from 'vtpm-toolstack/supervisor/leftovers';
import { isAlive, processId } from 'vtpm-toolstack/supervisor/processes';
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

  it('I-3 is found by its ledger: those who came and are not gone, whatever its last line was to be', async () => {
    const directory = temporaryDirectory();
    const path = join(directory, 'workers.json');
    const ledger = new WorkerLedger(
      path,
      createLogger('test', { 'log-level': 'silent', 'log-format': 'json' }),
    );
    const children = Array.from({ length: 4 }, () => spawn('/bin/sleep', ['100'], { stdio: 'ignore' }));
    const ids = children.map(({ pid }) => processId(pid ?? 0)!);
    const [first, gone, later, torn] = ids;
    try {
      ledger.add([first!]);
      const before = statSync(path).ino;
      ledger.add([gone!, later!]);
      ledger.remove([gone!]);
      assert.equal(statSync(path).ino, before, 'it grows');
      appendFileSync(path, JSON.stringify(torn));
      assert.equal(await endLeftovers(path, []), 2);
      assert.deepEqual(
        ids.map((id) => processId(id.pid)?.startTime === id.startTime && isAlive(id)),
        [false, true, false, true],
      );
    } finally {
      for (const child of children) child.kill('SIGKILL');
      removeDirectory(directory);
    }
  });
});
