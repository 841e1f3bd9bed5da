import assert from 'node:assert/strict';
import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';
import { lockFile } from 'vtpm-common';
import { descendants, isAlive, type ProcessId } from 'vtpm-toolstack/supervisor/processes';
import { removeDirectory, temporaryDirectory, until } from './supervisor-fixture.js';

const program = fileURLToPath(new URL('./handover-stages.js', import.meta.url));

describe('a process that goes on as another program', function () {
  this.timeout(60_000);
  let directory: string;
  let child: ChildProcess;
  // biome-ignore lint/suspicious/noExplicitAny: what the program says is the test.
  const said: any[] = [];

  before(async () => {
    directory = temporaryDirectory();
    child = spawn(process.execPath, [program, 'before', directory], {
      stdio: ['ignore', 'pipe', 'inherit'],
      env: { PATH: process.env.PATH, TAKEN_OUT: 'there', LISTEN_FDS: '1' },
    });
    const lines = createInterface({ input: child.stdout as NodeJS.ReadableStream });
    lines.on('line', (line) => said.push(JSON.parse(line)));
    await until(() => said.length === 4 || child.exitCode !== null);
    assert.equal(said.length, 4, JSON.stringify(said));
  });
  after(async () => {
    child.kill('SIGKILL');
    removeDirectory(directory);
  });

  it('goes on as before where the kernel refuses, and passes nothing on', () => {
    assert.match(said[0].refused, /execve .*absent: No such file/);
    assert.equal(said[0].answer, 'before');
    assert.equal(said[0].inherited, 1, 'its own standard output');
  });

  it('keeps its process id, the environment that it was given and exactly the descriptors that were named', () => {
    assert.equal(said[2].pid, child.pid);
    assert.equal(said[1].pid, child.pid);
    assert.equal(said[2].sockets, 3, 'standard output, the listener and the pipe of one child');
    assert.deepEqual(said[2].environment, ['there', null]);
    assert.equal(said[2].answer, 'after');
  });

  it('holds its locks all the time', () => {
    assert.equal(said[2].lock, true);
    assert.equal(lockFile(`${directory}/lock`), undefined);
  });

  it('reaps children that it did not make: one that died meanwhile, one that ends later, and no other', () => {
    assert.equal(said[2].died, 'killed by SIGKILL');
    assert.equal(said[2].stranger, 'it is no child of this process');
    assert.deepEqual([said[3].ended, said[3].hasExited, said[3].zombies], ['exit status 7', true, 0]);
    assert.equal(said[3].own, 3, "libuv's own child is libuv's");
  });

  it('takes children that die with their parent along when it is killed', async () => {
    const sandbox: ProcessId[] = [said[3].sandbox, ...descendants(said[3].sandbox.pid)];
    assert.ok(sandbox.length > 1 && sandbox.every(isAlive), 'they lived through the change');
    child.kill('SIGKILL');
    await once(child, 'close');
    await until(() => !sandbox.some(isAlive));
  });
});
