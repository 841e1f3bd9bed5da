import assert from 'node:assert/strict';
import {
  buildStubImage,
  removeDirectory,
  StubManager,
  SupervisorProcess,
  temporaryDirectory,
} from './supervisor-fixture.js';

describe('vtpm-supervisord: why a vTPM does not start', function () {
  this.timeout(60_000);

  it('is said once, with the next step, and stays readable in the list', async () => {
    const image = temporaryDirectory();
    const home = temporaryDirectory();
    const supervisor = await new SupervisorProcess(home, await buildStubImage(image)).ready();
    const manager = new StubManager(supervisor.paths);
    await manager.start();
    const start = async (): Promise<string> => {
      const { status, body } = await supervisor.call('POST', '/vtpms/web1/start');
      assert.ok(status >= 400);
      return body.error.message;
    };
    try {
      await supervisor.create('web1');
      // The manager's refusals come as `reason: sentence`, and the worker names the reason again.
      manager.refuse = { reason: 'image-not-allowed', message: 'image-not-allowed: allow it first' };
      assert.equal(await start(), 'allow it first');
      manager.refuse = { reason: 'stale-epoch', message: 'stale-epoch: another epoch owns the vTPM' };
      assert.equal(await start(), 'stale-epoch: another epoch owns the vTPM');
      await manager.stop();
      assert.equal(await start(), 'the manager is not running; start it: vtpmctl up');
      const { body } = await supervisor.call('GET', '/vtpms/web1');
      assert.equal(body.reason, 'the last start failed: the manager is not running; start it: vtpmctl up');
    } finally {
      await supervisor.end('SIGKILL');
      await manager.stop();
      removeDirectory(home);
      removeDirectory(image);
    }
  });
});
