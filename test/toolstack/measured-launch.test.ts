import assert from 'node:assert/strict';
import {
  chmodSync,
  copyFileSync,
  lstatSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  utimesSync,
  writeFileSync,
} from 'node:fs';
import { join } from 'node:path';
import {
  buildStubImage,
  connectDoor,
  exchange,
  removeDirectory,
  StubManager,
  SupervisorProcess,
  temporaryDirectory,
  until,
  workersOf,
} from './supervisor-fixture.js';

/** In place of the worker: a start that executes it does not end well. */
const EVIL = "process.stderr.write('unmeasured code ran'); process.exit(3);";

describe('a measured launch', function () {
  this.timeout(60_000);
  let installed: string;
  let manifest: string;
  let home: string;
  let supervisor: SupervisorProcess;
  let manager: StubManager;

  before(async () => {
    installed = temporaryDirectory();
    manifest = await buildStubImage(installed);
  });
  after(() => removeDirectory(installed));
  beforeEach(async () => {
    home = temporaryDirectory();
    supervisor = await new SupervisorProcess(home, manifest, ['--log-format', 'json']).ready();
    manager = new StubManager(supervisor.paths);
    await manager.start();
    await supervisor.create('web1');
  });
  afterEach(async () => {
    await supervisor.end('SIGKILL');
    await manager.stop();
    removeDirectory(home);
  });

  const images = () => supervisor.paths.supervisor.images;
  const copy = (digest: string) => join(images(), digest, 'root/app/stub.mjs');
  const digestNow = async (): Promise<string> => (await supervisor.call('GET', '/image')).body.digest;
  const start = () => supervisor.call('POST', '/vtpms/web1/start');

  /** As somebody with the supervisor's uid can: the content of another, and then everything as it looked before. */
  function swap(path: string, content: string | Buffer): void {
    const { atime, mtime, mode } = lstatSync(path);
    chmodSync(path, 0o644);
    writeFileSync(path, content);
    chmodSync(path, mode & 0o7777);
    utimesSync(path, atime, mtime);
  }

  it('does not execute what replaced a file of the copy after it was hashed', async () => {
    const digest = await digestNow();
    swap(copy(digest), EVIL);
    const { status, body } = await start();
    assert.equal(status, 200, JSON.stringify(body));
    assert.equal(manager.tickets[0] && Buffer.from(manager.tickets[0].imageDigest).toString('hex'), digest);
    assert.deepEqual(readFileSync(copy(digest)), readFileSync(join(installed, 'stub.mjs')));
    assert.match(supervisor.stderr, /was touched since it was measured/);
  });

  it('gives no identity to a worker whose files were others for a moment while it started', async () => {
    const path = copy(await digestNow());
    const measured = readFileSync(path);
    manager.beforeGreeting = async () => {
      await until(() => workersOf(supervisor.paths).length > 0);
      swap(path, EVIL);
      swap(path, measured);
    };
    const { status, body } = await start();
    assert.equal(body.error?.code, 'image-changed', JSON.stringify(body));
    assert.equal(status, 409);
    assert.match(body.error.message, /stub\.mjs was changed while a worker was started/);
    assert.deepEqual(manager.tickets, []);
    manager.beforeGreeting = undefined;
    assert.equal((await start()).status, 200, 'nothing is left of it');
  });

  it('goes over to what an upgrade installed, while workers run on from the copy that they were started from', async () => {
    const before = await digestNow();
    assert.equal((await start()).status, 200);
    const source = join(installed, 'stub.mjs');
    const content = readFileSync(source);
    try {
      writeFileSync(source, Buffer.concat([content, Buffer.from('\n// upgraded\n')]));
      assert.equal(await digestNow(), before, 'not by itself');
      const refused = await supervisor.call('PUT', '/image', { digest: 'ab'.repeat(32) });
      assert.equal(refused.body.error.code, 'image-not-allowed');
      assert.equal(await digestNow(), before);
      assert.deepEqual(readdirSync(images()), [before]);
      const { status, body } = await supervisor.call('PUT', '/image', {});
      assert.equal(status, 200, JSON.stringify(body));
      assert.notEqual(body.digest, before);
      assert.equal(await digestNow(), body.digest);
      assert.deepEqual(readdirSync(images()).sort(), [before, body.digest].sort());
      const running = (await supervisor.call('GET', '/vtpms/web1')).body;
      const guest = await connectDoor(running.sockets.tpm);
      assert.equal(await exchange(guest, 'still there'), 'still there');
      guest.end();
      await supervisor.create('web2');
      assert.equal((await supervisor.call('POST', '/vtpms/web2/start')).status, 200);
      const [first, second] = manager.tickets.map(({ imageDigest }) =>
        Buffer.from(imageDigest).toString('hex'),
      );
      assert.deepEqual([first, second], [before, body.digest]);
      // The last one that used it ends.
      await supervisor.call('POST', '/vtpms/web1/stop');
      await until(() => readdirSync(images()).length === 1);
      assert.deepEqual(readdirSync(images()), [body.digest]);
    } finally {
      writeFileSync(source, content);
    }
    // As `systemctl reload` does.
    process.kill(supervisor.pid, 'SIGHUP');
    await until(async () => (await digestNow()) === before);
  });

  it('keeps the old image where what is installed cannot be measured', async () => {
    const before = await digestNow();
    copyFileSync(manifest, `${manifest}.kept`);
    try {
      rmSync(manifest);
      assert.equal((await supervisor.call('PUT', '/image', {})).body.error.code, 'missing-package');
      assert.equal(await digestNow(), before);
      assert.equal((await start()).status, 200);
      await supervisor.call('POST', '/vtpms/web1/stop');
      // Touched, and what it was: no need of a new copy.
      swap(copy(before), readFileSync(copy(before)));
      assert.equal((await start()).status, 200);
      await supervisor.call('POST', '/vtpms/web1/stop');
      swap(copy(before), EVIL);
      assert.equal((await start()).body.error.code, 'missing-package', 'nothing to make a good copy of');
    } finally {
      renameSync(`${manifest}.kept`, manifest);
    }
  });
});
