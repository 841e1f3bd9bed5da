import assert from 'node:assert/strict';
import { execFileSync, spawn } from 'node:child_process';
import { once } from 'node:events';
import { closeSync, openSync, readdirSync } from 'node:fs';
import { connect, type Socket } from 'node:net';
import { isAlive, killAndWait, type ProcessId, processId } from 'vtpm-toolstack/supervisor/processes';
import {
  buildStubImage,
  removeDirectory,
  StubManager,
  SupervisorProcess,
  temporaryDirectory,
} from './supervisor-fixture.js';

/** Runs `body` while this process cannot open a file. */
async function withoutDescriptors(body: () => void | Promise<void>): Promise<void> {
  const limits = execFileSync(
    'prlimit',
    ['--pid', String(process.pid), '--nofile', '--raw', '--noheadings'],
    {
      encoding: 'utf8',
    },
  )
    .trim()
    .split(/\s+/);
  const [hard = '', soft = ''] = [limits.at(-2), limits.at(-3)];
  const held: number[] = [];
  // Whatever the files before this one have left open in this process.
  const limit = Math.max(...readdirSync('/proc/self/fd').map(Number)) + 64;
  execFileSync('prlimit', ['--pid', String(process.pid), `--nofile=${limit}:${hard}`]);
  try {
    for (;;) held.push(openSync('/dev/null', 'r'));
  } catch (error) {
    assert.equal((error as NodeJS.ErrnoException).code, 'EMFILE');
  }
  try {
    await body();
  } finally {
    for (const fd of held) closeSync(fd);
    execFileSync('prlimit', ['--pid', String(process.pid), `--nofile=${soft}:${hard}`]);
  }
}

describe('a supervisor without free descriptors', function () {
  this.timeout(60_000);

  it('I-3 does not take a process for dead that it cannot look at', async () => {
    const child = spawn('sleep', ['1000'], { stdio: 'ignore' });
    const gone = once(child, 'exit');
    const id = processId(child.pid ?? -1) as ProcessId;
    try {
      await withoutDescriptors(async () => {
        assert.throws(() => processId(id.pid), /EMFILE/);
        assert.equal(isAlive(id), true);
        await assert.rejects(killAndWait([id], 0), /does not end/);
      });
      // Killed all the same.
      assert.deepEqual(await gone, [null, 'SIGKILL']);
      assert.equal(isAlive(id), false);
    } finally {
      child.kill('SIGKILL');
    }
  });

  it('refuses to start a worker, and goes on', async () => {
    const directory = temporaryDirectory();
    const home = temporaryDirectory();
    const supervisor = new SupervisorProcess(home, await buildStubImage(directory), ['--log-format', 'json']);
    const manager = new StubManager(supervisor.paths);
    const clients: Socket[] = [];
    try {
      await supervisor.ready();
      await manager.start();
      await supervisor.create('web1');
      await supervisor.create('web2');
      const { sockets } = (await supervisor.call('POST', '/vtpms/web1/start')).body;
      execFileSync('prlimit', ['--pid', String(supervisor.pid), '--nofile=64:64']);
      for (let count = 0; count < 60; count++) {
        const client = connect(count % 2 ? sockets.tpm : sockets.tcti);
        client.on('error', () => {});
        clients.push(client);
        await Promise.race([once(client, 'connect'), once(client, 'close')]);
      }
      // One connection is let go after the other, so that each step of a start meets the limit once.
      for (const client of clients) {
        client.destroy();
        await supervisor.call('POST', '/vtpms/web2/start').catch(() => undefined);
        assert.equal(supervisor.hasEnded, false, supervisor.stderr);
      }
      assert.equal((await supervisor.call('GET', '/vtpms/web1')).body.state, 'running');
    } finally {
      for (const client of clients) client.destroy();
      await supervisor.end('SIGKILL');
      await manager.stop();
      removeDirectory(home);
      removeDirectory(directory);
    }
  });
});
