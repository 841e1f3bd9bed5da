import assert from 'node:assert/strict';
import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdirSync, mkdtempSync, rmSync, symlinkSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { doorOf, FrontendError } from 'vtpm-frontend-driver';
import { run } from '../support/installation.js';
import { isA } from '../support/is-a.js';
import { type Swtpm, startSwtpm } from '../support/swtpm.js';

const PROGRAM = fileURLToPath(new URL('../../../frontend-driver/bin/vtpm-frontend.js', import.meta.url));
const RANDOM_8 = Buffer.from('80010000000c0000017b0008', 'hex');

describe('vtpm-frontend stdio', () => {
  let tpm: Swtpm;
  let directory: string;
  before(async () => {
    tpm = await startSwtpm();
    directory = mkdtempSync(join(tmpdir(), 'vtpm-stdio-'));
    mkdirSync(join(directory, 'run/vtpms/web1'), { recursive: true });
    symlinkSync(tpm.socket, join(directory, 'run/vtpms/web1/tpm.sock'));
  });
  after(async () => {
    await tpm.stop();
    rmSync(directory, { recursive: true, force: true });
  });

  const stdio = (target: string, input: Uint8Array, env: NodeJS.ProcessEnv = {}, ...flags: string[]) =>
    run(process.execPath, [PROGRAM, 'stdio', target, ...flags], env, input);

  it("works as the program behind tpm2-tss's cmd TCTI, for unmodified tpm2-tools", async () => {
    const env = {
      TPM2TOOLS_TCTI: `cmd:${process.execPath} ${PROGRAM} stdio web1`,
      VTPM_HOME: directory,
      TSS2_LOG: 'all+none',
    };
    const file = (name: string) => join(directory, name);
    for (const [tool, ...args] of [
      ['tpm2_getrandom', '--hex', '8'],
      ['tpm2_createprimary', '-C', 'o', '-G', 'ecc', '-c', file('primary.ctx')],
      ['tpm2_create', '-C', file('primary.ctx'), '-u', file('key.pub'), '-r', file('key.priv')],
      ['tpm2_pcrextend', `16:sha256=${'ab'.repeat(32)}`],
      ['tpm2_pcrread', 'sha256:16'],
    ] as [string, ...string[]][]) {
      const { code, stderr } = await run(tool, args, env);
      assert.equal(code, 0, `${tool}: ${stderr}`);
    }
  });

  it('finds a vTPM by name through flag, environment and configuration file', async () => {
    const elsewhere = join(directory, 'elsewhere');
    mkdirSync(elsewhere);
    writeFileSync(join(elsewhere, 'config.json'), JSON.stringify({ 'run-dir': join(directory, 'run') }));
    for (const [env, flags] of [
      [{ VTPM_RUN_DIR: join(directory, 'run') }, []],
      [{ VTPM_HOME: directory }, []],
      [{}, ['--home', directory]],
      [{ VTPM_RUN_DIR: '/nowhere' }, ['--run-dir', join(directory, 'run')]],
      [{ VTPM_HOME: elsewhere }, []],
    ] as [NodeJS.ProcessEnv, string[]][]) {
      const { code, stderr, stdout } = await stdio('web1', RANDOM_8, env, ...flags);
      assert.equal(code, 0, stderr);
      assert.ok(stdout.length > 0);
    }
  });

  it('knows where installations are without being told', () => {
    const env = { XDG_STATE_HOME: '/state' };
    assert.equal(doorOf('web1', {}, {}, 0), '/run/vtpm-manager/vtpms/web1/tpm.sock');
    assert.equal(doorOf('web1', {}, env, 1000), '/state/vtpm-manager/run/vtpms/web1/tpm.sock');
    assert.equal(doorOf('web1', { home: '/srv/two' }, {}, 0), '/srv/two/run/vtpms/web1/tpm.sock');
    assert.equal(doorOf('/a/b.sock', {}, env, 1000), '/a/b.sock');
    for (const name of ['', '.', '..'])
      assert.throws(
        () => doorOf(name, {}, {}, 0),
        (error) => isA(error, FrontendError),
      );
  });

  it('ends with 3 and what to do when no vTPM answers', async () => {
    const { code, stderr, stdout } = await stdio('web9', RANDOM_8, { VTPM_HOME: directory });
    assert.equal(code, 3);
    assert.match(stderr, /web9.*not running.*\n.*vtpmctl start/);
    assert.equal(stdout, '');
  });

  it('ends with 1 on input that is no TPM command, or ends within one', async () => {
    const text = await stdio(tpm.socket, Buffer.from('hello, this is text\n'));
    assert.equal(text.code, 1);
    assert.match(text.stderr, /not a sequence of TPM commands/);
    const half = await stdio(tpm.socket, RANDOM_8.subarray(0, 7));
    assert.equal(half.code, 1);
    assert.match(half.stderr, /after 7 of its bytes/);
  });

  it('ends with 2 on wrong usage', async () => {
    assert.equal((await run(process.execPath, [PROGRAM, 'stdio'])).code, 2);
    assert.equal((await run(process.execPath, [PROGRAM, 'stdin', 'web1'])).code, 2);
    assert.equal((await run(process.execPath, [PROGRAM, '--help'])).code, 0);
  });

  it('ends when the vTPM goes away, even while nothing is asked', async () => {
    const other = await startSwtpm();
    const bridge = spawn(process.execPath, [PROGRAM, 'stdio', other.socket], { stdio: 'pipe' });
    try {
      bridge.stdin.write(RANDOM_8);
      await once(bridge.stdout, 'data');
      const ended = exitOf(bridge);
      await other.kill();
      assert.equal(await ended, 1);
    } finally {
      bridge.kill('SIGKILL');
      await other.stop();
    }
  });
});

async function exitOf(child: ChildProcess): Promise<number | null> {
  const [code] = (await once(child, 'exit')) as [number | null];
  return code;
}
