import assert from 'node:assert/strict';
import {
  buildStubImage,
  newVtpm,
  removeDirectory,
  StubManager,
  SupervisorProcess,
  temporaryDirectory,
  until,
} from './supervisor-fixture.js';

describe('a vTPM that is removed while it waits to be started', function () {
  this.timeout(60_000);

  it('I-3 never runs beside one that was created anew with its id', async () => {
    const image = temporaryDirectory();
    const home = temporaryDirectory();
    const manifest = await buildStubImage(image);
    let supervisor = await new SupervisorProcess(home, manifest, ['--log-format', 'json']).ready();
    const manager = new StubManager(supervisor.paths);
    try {
      const { delegateKey } = (await supervisor.call('GET', '/health')).body;
      const body = newVtpm('web1', Buffer.from(delegateKey, 'hex'), { autostart: true });
      const other = newVtpm('web2', Buffer.from(delegateKey, 'hex'), { autostart: true });
      assert.equal((await supervisor.call('POST', '/vtpms', body)).status, 201);
      assert.equal((await supervisor.call('POST', '/vtpms', other)).status, 201);
      await supervisor.end('SIGTERM');
      // The manager is away: both wait.
      supervisor = await new SupervisorProcess(home, manifest, ['--log-format', 'json']).ready();
      assert.equal((await supervisor.call('DELETE', '/vtpms/web1')).status, 200);
      assert.equal((await supervisor.call('POST', '/vtpms', body)).status, 201);
      await manager.start();
      // Started after web1 would have been.
      await until(async () => (await supervisor.call('GET', '/vtpms/web2')).body.state === 'running');
      const started = await supervisor.call('POST', '/vtpms/web1/start');
      assert.equal(started.status, 200, JSON.stringify(started.body));
      assert.equal(started.body.epoch, 1);
      assert.equal(manager.tickets.length, 2, 'one worker each');
    } finally {
      await supervisor.end('SIGKILL');
      await manager.stop();
      removeDirectory(home);
      removeDirectory(image);
    }
  });
});
