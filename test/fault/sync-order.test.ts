import assert from 'node:assert/strict';
import { spawnSync } from 'node:child_process';
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { basename, dirname, join } from 'node:path';
import { pathsOf } from 'vtpm-common';
import { readTrace, tracedTo } from '../support/disk-trace.js';
import { cleanEnvironment, REPOSITORY } from '../support/installation.js';

/** That nothing goes on before it: fault/power-loss shows what that is for. */
describe('I-4 what takes the place of a file', () => {
  let home: string;
  beforeEach(() => {
    home = mkdtempSync(join(tmpdir(), 'vtpm-sync-'));
  });
  afterEach(() => rmSync(home, { recursive: true, force: true }));

  /** @returns what `source` does to the disk below the home, each call when it has ended */
  async function traced(source: string): Promise<string[]> {
    const trace = join(dirname(home), `${basename(home)}.trace`);
    const [file = '', ...args] = tracedTo(trace);
    const program = [process.execPath, '--input-type=module', '-e', source];
    const ran = spawnSync(file, [...args, ...program], { cwd: REPOSITORY, env: cleanEnvironment() });
    assert.equal(ran.status, 0, String(ran.stderr));
    const moments = await readTrace(trace, home);
    rmSync(trace);
    return moments
      .filter(({ isBegin }) => !isBegin)
      .map(({ call }) => `${call.kind} ${call.path === home ? '.' : call.path.slice(home.length + 1)}`);
  }

  it('is on the disk before it does, and then its name is', async () => {
    const file = JSON.stringify(join(home, 'f'));
    const calls = await traced(
      `import { writeFileDurably } from 'vtpm-common'; writeFileDurably(${file}, 'content');`,
    );
    assert.deepEqual(calls, ['open f.new', 'write f.new', 'sync f.new', 'rename f.new', 'sync .']);
  });

  it('is an enrolment whose name is on the disk when the rotation goes on', async () => {
    const { manager } = pathsOf(home, join(home, 'run'));
    mkdirSync(dirname(manager.enrolment), { recursive: true });
    writeFileSync(`${manager.enrolment}.next`, '{}');
    const calls = await traced(
      `import { pathsOf } from 'vtpm-common'; import { adoptNext } from 'vtpm-manager/enrolment';
       adoptNext(pathsOf(${JSON.stringify(home)}, ${JSON.stringify(join(home, 'run'))}).manager);`,
    );
    assert.deepEqual(calls, ['rename manager/enrolment.json.next', 'sync manager']);
  });
});
