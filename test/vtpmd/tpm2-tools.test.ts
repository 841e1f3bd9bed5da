import assert from 'node:assert/strict';
import { execFile } from 'node:child_process';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { createServer, type Server } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { promisify } from 'node:util';
import { socketFd } from 'vtpm-common/libc';
import { DoorClients } from 'vtpm-toolstack/supervisor/door-clients';
import { MiniManager } from '../support/mini-manager.js';
import { WorkerProcess } from '../support/worker-process.js';

const run = promisify(execFile);

describe('worker: tpm2-tools through the tcti door', () => {
  let directory: string;
  let manager: MiniManager;
  let worker: WorkerProcess;
  let servers: Server[];
  const clients = new DoorClients();

  before(async () => {
    directory = mkdtempSync(join(tmpdir(), 'tools-'));
    manager = new MiniManager();
    worker = await new WorkerProcess(manager).serve();
    servers = (['tcti', 'tcti-ctrl'] as const).map((door) =>
      createServer({ pauseOnConnect: true }, (socket) => {
        // As the supervisor does: the worker cannot see who its clients are.
        for (const peer of clients.takeGone()) worker.send({ type: 'peer-gone', peer });
        worker.passCopy(door, socketFd(socket), clients.add(socket));
        socket.destroy();
      }).listen(join(directory, door === 'tcti' ? 'tcti.sock' : 'tcti.sock.ctrl')),
    );
  });

  after(async () => {
    for (const server of servers) server.close();
    await worker.kill();
    manager.stop();
    rmSync(directory, { recursive: true, force: true });
  });

  async function tool(name: string, ...parameters: string[]): Promise<string> {
    const { stdout } = await run(name, parameters, {
      cwd: directory,
      env: { PATH: process.env.PATH, TPM2TOOLS_TCTI: `swtpm:path=${join(directory, 'tcti.sock')}` },
    });
    return stdout;
  }

  it('gives random bytes', async () => {
    assert.match(await tool('tpm2_getrandom', '--hex', '16'), /^[0-9a-f]{32}$/);
  });

  it('does not run out of slots over many commands', async () => {
    for (let count = 0; count < 6; count++) {
      await tool('tpm2_createprimary', '-Q', '-C', 'o', '-G', 'ecc', '-c', `primary${count}.ctx`);
    }
    for (let count = 0; count < 4; count++) {
      await tool('tpm2_startauthsession', '--policy-session', '-S', 'session.ctx');
      await tool('tpm2_flushcontext', 'session.ctx');
    }
    assert.equal(await tool('tpm2_getcap', 'handles-loaded-session'), '');
  });

  it('keeps a saved session from one command to the next', async () => {
    writeFileSync(join(directory, 'secret'), 'sealed to PCR 0');
    await tool('tpm2_createprimary', '-Q', '-C', 'o', '-G', 'ecc', '-c', 'primary.ctx');
    await tool('tpm2_startauthsession', '-S', 'trial.ctx');
    await tool('tpm2_policypcr', '-Q', '-S', 'trial.ctx', '-l', 'sha256:0', '-L', 'policy');
    await tool('tpm2_flushcontext', 'trial.ctx');
    const files = ['-u', 'sealed.pub', '-r', 'sealed.priv'];
    await tool('tpm2_create', '-Q', '-C', 'primary.ctx', '-i', 'secret', '-L', 'policy', ...files);
    await tool('tpm2_load', '-Q', '-C', 'primary.ctx', '-c', 'sealed.ctx', ...files);
    await tool('tpm2_startauthsession', '--policy-session', '-S', 'session.ctx');
    await tool('tpm2_policypcr', '-Q', '-S', 'session.ctx', '-l', 'sha256:0');
    assert.equal(
      await tool('tpm2_unseal', '-c', 'sealed.ctx', '-p', 'session:session.ctx'),
      'sealed to PCR 0',
    );
    await tool('tpm2_flushcontext', 'session.ctx');
  });

  it('serves tools that run at the same time', async () => {
    await Promise.all(
      Array.from({ length: 6 }, async (_, index) => {
        for (let round = 0; round < 5; round++) {
          assert.equal((await tool('tpm2_getrandom', '--hex', String(index + 1))).length, 2 * (index + 1));
        }
      }),
    );
  });
});
