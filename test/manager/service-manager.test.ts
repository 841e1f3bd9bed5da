import assert from 'node:assert/strict';
import { once } from 'node:events';
import { existsSync, readFileSync, statSync } from 'node:fs';
import { join } from 'node:path';
import { ServiceNotifier } from 'vtpm-common';
import { Installation, REPOSITORY } from '../support/installation.js';
import { ServiceManager } from '../support/service-manager.js';
import { until } from '../support/until.js';

describe('a manager under a service manager', function () {
  this.timeout(60_000);
  let installation: Installation;
  let system: ServiceManager;
  const program = join(REPOSITORY, 'manager/bin/vtpm-managerd.js');
  const args = () => ['--home', installation.home, '--log-level', 'error'];

  before(async () => {
    installation = await Installation.create({ tpm: 'embedded' });
  });
  after(() => installation.destroy());
  afterEach(() => system.close());

  it('says when it serves, that its event loop turns, and that it ends', async () => {
    system = new ServiceManager(join(installation.directory, 'notify.sock'));
    const child = system.start(program, args(), 200);
    await until('it is ready', () => system.told.some((text) => text.startsWith('READY=1\n')));
    assert.match(system.told.find((text) => text.startsWith('READY=1')) ?? '', /STATUS=the manager is ready/);
    assert.equal((await installation.admin('GET', '/health')).body.status, 'ready', 'not said before');
    const beats = () => system.told.filter((text) => text === 'WATCHDOG=1').length;
    const before = beats();
    await until('it is alive', () => beats() >= before + 2);
    for (const pid of childrenOf(child.pid ?? -1)) {
      assert.doesNotMatch(readFileSync(`/proc/${pid}/environ`, 'latin1'), /NOTIFY_SOCKET|WATCHDOG|LISTEN_/);
    }
    assert.equal(
      system.told.some((text) => text.startsWith('STOPPING=1')),
      false,
    );
    child.kill('SIGTERM');
    await once(child, 'exit');
    assert.match(system.told.at(-1) ?? '', /^STOPPING=1\n/);
  });

  it('serves on the sockets that it is given, and leaves them to the next one', async () => {
    system = new ServiceManager(`@vtpm-test-${process.pid}`);
    const { adminSocket, workerSocket, toolstackSocket } = installation.paths.manager;
    const sockets = [adminSocket, workerSocket, toolstackSocket];
    for (const path of sockets) system.listen(path);
    const inodes = sockets.map((path) => statSync(path).ino);
    // Nobody is there yet, and the call waits.
    const early = installation.admin('GET', '/health');
    const first = system.start(program, args());
    assert.equal((await early).status, 200);
    await until('it is ready', () => system.told.some((text) => text.startsWith('READY=1')));
    await installation.startSupervisor();
    await installation.vtpm('web1');
    first.kill('SIGTERM');
    await once(first, 'exit');
    assert.deepEqual(
      sockets.map((path) => existsSync(path) && statSync(path).ino),
      inodes,
    );
    const between = installation.admin('GET', '/health');
    const second = system.start(program, args());
    assert.equal((await between).status, 200);
    // The worker came back through the socket of the first one, too.
    await until('the worker has its link', async () => {
      const { id } = (await installation.supervisord('GET', '/vtpms/web1')).body;
      const { session } = (await installation.admin('GET', `/vtpms/${id}`)).body as {
        session?: { connected: boolean };
      };
      return session?.connected === true;
    });
    const { stdout, code } = await installation.ctl('exec', 'web1', '--', 'tpm2_getrandom', '--hex', '4');
    assert.deepEqual([code, /^[0-9a-f]{8}$/.test(stdout.trim())], [0, true]);
    await installation.stopDaemons();
    second.kill('SIGTERM');
    await once(second, 'exit');
  });

  it('does nothing of it where nobody asked', () => {
    system = new ServiceManager(join(installation.directory, 'unused.sock'));
    const env = { WATCHDOG_USEC: '1000' };
    new ServiceNotifier(env).ready('served');
    assert.deepEqual(env, {});
    assert.deepEqual(system.told, []);
  });
});

function childrenOf(pid: number): string[] {
  const text = readFileSync(`/proc/${pid}/task/${pid}/children`, 'utf8').trim();
  return text === '' ? [] : text.split(' ');
}
