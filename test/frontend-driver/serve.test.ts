import assert from 'node:assert/strict';
import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { existsSync, mkdtempSync, rmSync, statSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { Installation, run } from '../support/installation.js';
import { reapAtExit } from '../support/reap.js';
import { until } from '../support/until.js';

const PROGRAM = fileURLToPath(new URL('../../../frontend-driver/bin/vtpm-frontend.js', import.meta.url));

describe('vtpm-frontend serve', function () {
  this.timeout(60_000);
  let installation: Installation;
  let directory: string;

  before(async () => {
    directory = mkdtempSync(join(tmpdir(), 'vtpm-serve-'));
    installation = await Installation.create({ tpm: 'embedded' });
    await installation.start();
    await installation.vtpm('web1', '--doors', 'tpm,ring');
  });
  after(async () => {
    await installation.destroy();
    rmSync(directory, { recursive: true, force: true });
  });

  const serve = async (socket: string, ...args: string[]): Promise<ChildProcess> => {
    const bridge = reapAtExit(
      spawn(process.execPath, [PROGRAM, 'serve', ...args, '--socket', socket], {
        stdio: ['ignore', 'pipe', 'inherit'],
      }),
    );
    const [said] = (await once(bridge.stdout!, 'data')) as [Buffer];
    assert.equal(said.toString(), `${socket}\n`);
    return bridge;
  };
  const tool = async (socket: string, name: string, ...args: string[]): Promise<string> => {
    const env = { TPM2TOOLS_TCTI: `swtpm:path=${socket}`, TSS2_LOG: 'all+none' };
    const { code, stdout, stderr } = await run(name, args, env);
    assert.equal(code, 0, `${name}: ${stderr}`);
    return stdout;
  };

  for (const door of ['tpm', 'ring'] as const) {
    it(`serves unmodified tpm2-tools through the door ${door}, over an upgrade, a kill -9 and a new start`, async () => {
      const socket = join(directory, `${door}.sock`);
      const flags = door === 'ring' ? ['--ring'] : [];
      const bridge = await serve(socket, ...flags, installation.door('web1', door));
      const file = (name: string) => join(directory, `${door}-${name}`);
      assert.equal(statSync(socket).mode & 0o777, 0o600);
      assert.equal((await tool(socket, 'tpm2_getrandom', '--hex', '8')).length, 16);
      await tool(socket, 'tpm2_createprimary', '-C', 'o', '-G', 'ecc', '-c', file('primary.ctx'));
      await tool(socket, 'tpm2_flushcontext', '-t');
      await tool(socket, 'tpm2_create', '-C', file('primary.ctx'), '-u', file('pub'), '-r', file('priv'));
      await tool(socket, 'tpm2_flushcontext', '-t');
      await tool(socket, 'tpm2_pcrextend', `16:sha256=${'ab'.repeat(32)}`);
      const pcr = await tool(socket, 'tpm2_pcrread', 'sha256:16');
      await installation.ctlJson('supervisor', 'upgrade');
      process.kill(await installation.workerPid('web1'), 'SIGKILL');
      assert.equal(await tool(socket, 'tpm2_pcrread', 'sha256:16'), pcr, 'a worker is replaced');
      await installation.ctlJson('stop', 'web1');
      await installation.ctlJson('start', 'web1');
      assert.match(
        await tool(socket, 'tpm2_pcrread', 'sha256:16'),
        /16: 0x0{64}/,
        'a new start is another run',
      );
      const ended = once(bridge, 'exit');
      bridge.kill('SIGTERM');
      assert.deepEqual(await ended, [0, null]);
      assert.equal(existsSync(socket), false);
    });
  }

  it('is a bridge for the cmd TCTI through a ring, too', async () => {
    const env = {
      TPM2TOOLS_TCTI: `cmd:${process.execPath} ${PROGRAM} stdio --ring web1`,
      VTPM_HOME: installation.home,
      TSS2_LOG: 'all+none',
    };
    const { code, stdout, stderr } = await run('tpm2_getrandom', ['--hex', '8'], env);
    assert.equal(code, 0, stderr);
    assert.equal(stdout.length, 16);
  });

  it('says what is missing where the kernel makes no TPMs of others', async function () {
    if (existsSync('/dev/vtpmx')) this.skip();
    const { code, stderr } = await run(process.execPath, [PROGRAM, 'proxy', installation.door('web1')]);
    assert.equal(code, 3);
    assert.match(stderr, /no \/dev\/vtpmx.*tpm_vtpm_proxy/);
  });

  it('ends with 3 where no vTPM is there, and with 2 where the socket cannot be made', async () => {
    const missing = await run(process.execPath, [
      PROGRAM,
      'serve',
      '/nowhere/tpm.sock',
      '--socket',
      join(directory, 'x'),
    ]);
    assert.equal(missing.code, 3);
    const bad = await run(process.execPath, [
      PROGRAM,
      'serve',
      installation.door('web1'),
      '--socket',
      '/nowhere/x',
    ]);
    assert.equal(bad.code, 2, bad.stderr);
    await until('nothing is left', () => !existsSync(join(directory, 'x')));
  });
});
