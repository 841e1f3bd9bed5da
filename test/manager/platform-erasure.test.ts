import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { join } from 'node:path';
import { readEnrolment } from 'vtpm-manager/enrolment';
import { REPOSITORY } from '../support/installation.js';
import { until } from '../support/until.js';
import { Host } from './platform-fixture.js';

const message = (body: Record<string, unknown>) => (body.error as { message: string }).message;

/** Arguments for Node: the wall clock is ahead. */
const ahead = (hours: number) => [
  '--import',
  `data:text/javascript,${encodeURIComponent(
    `const now = Date.now.bind(Date); Date.now = () => now() + ${hours * 3_600_000};`,
  )}`,
];

describe('what was retired', () => {
  let host: Host;
  beforeEach(async () => {
    host = await Host.create();
  });
  afterEach(() => host.destroy());

  const generation = () => readEnrolment(host.manager.paths).enrolment.tpm.root.generation;

  /** Opens a record of a copy of the disk with the manager's own code and the chip, as a thief of both would. */
  function stolenState(disk: string, id: string): string {
    const script = `
      import { pathsOf } from 'vtpm-common';
      import { readEnrolment } from 'vtpm-manager/enrolment';
      import { openRootTpm } from 'vtpm-manager/root-tpm/index';
      import { unlock } from 'vtpm-manager/unlock';
      import { openLmdbStore } from 'vtpm-manager/store/index';
      import { decodeRecord, openState } from 'vtpm-manager/records/index';
      import { uuidToBytes } from 'vtpm-proto';
      const [disk, id] = process.argv.slice(-2);
      const own = pathsOf('/nowhere').manager;
      const paths = Object.fromEntries(Object.entries(own).map(([n, p]) => [n, p.replace(own.directory, disk)]));
      const file = readEnrolment(paths);
      const tpm = await openRootTpm(file.enrolment.tpm);
      try {
        const { keys } = await unlock(tpm, paths, file, []);
        const log = { info() {}, warn() {}, error() {}, debug() {} };
        const store = await openLmdbStore({ directory: paths.store, create: false, sandbox: true, log, onLost() {} });
        const { value } = await store.get('vtpm/' + id);
        process.stdout.write(openState(keys, decodeRecord(keys, uuidToBytes(id), value)).permanent.toString());
        await store.close();
      } catch (error) {
        process.stdout.write('refused: ' + error.code);
      } finally {
        await tpm.close();
      }`;
    return execFileSync(process.execPath, ['--input-type=module', '-e', script, '--', disk, id], {
      cwd: join(REPOSITORY, 'test'),
      encoding: 'utf8',
    });
  }

  it('does not open on an old disk after a rotation; before it, it does', async () => {
    await host.manager.start();
    await host.allowImage();
    const { vtpm, worker } = await host.guest('secret of the guest');
    worker.close();
    const other = await host.guest('stays');
    other.worker.close();
    await host.manager.stop();
    const disk = host.saveDisk();
    await host.manager.start();
    await until('the worker is gone', async () => {
      const { status } = await host.post(`/vtpms/${vtpm.id}/retire`);
      return status === 200;
    });
    const { erasure } = await host.view();
    const { since, due } = erasure as { since: string; due: string };
    assert.equal(Date.parse(due) - Date.parse(since), 24 * 3_600_000);
    await host.manager.stop();
    assert.equal(stolenState(disk, vtpm.id), 'secret of the guest', 'the positive control');
    await host.manager.start();
    assert.equal((await host.post('/platform/rotations')).status, 200);
    assert.equal((await host.view()).erasure, null);
    assert.equal((await host.loaded(other.vtpm.id, 1n)).permanent, 'stays');
    await host.manager.stop();
    assert.equal(stolenState(disk, vtpm.id), 'refused: tpm-emptied');
  });

  it('is erased by itself after erase-after, and not before', async () => {
    await host.manager.start();
    await host.allowImage();
    const { vtpm, worker, session } = await host.guest();
    session.stream?.cancel();
    worker.close();
    await until('it is retired', async () => (await host.post(`/vtpms/${vtpm.id}/retire`)).status === 200);
    await host.manager.stop();
    await host.manager.start({ nodeArgs: ahead(23) });
    await host.view();
    assert.equal(generation(), 1);
    await host.manager.stop();
    await host.manager.start({ nodeArgs: ahead(25) });
    await until('the rotation has come', async () => (await host.view()).erasure === null);
    await until('it is done', async () => !(await host.view()).isRotating);
    assert.equal(generation(), 2);
    await host.manager.stop();
    await host.assertNothingLeft();
  });

  it('is not erased without the owner password where there is one, and that is said', async () => {
    await host.manager.start();
    await host.manager.stop();
    await host.tools('tpm2_changeauth', '-c', 'owner', 'secret');
    await host.manager.start();
    const refused = await host.post('/platform/rotations');
    assert.equal(refused.status, 400);
    assert.match(message(refused.body), /owner password.*--owner-auth-file/);
    const wrong = await host.post('/platform/rotations', { ownerAuth: Buffer.from('guess').toString('hex') });
    assert.equal(wrong.status, 400);
    const ownerAuth = Buffer.from('secret').toString('hex');
    const { status, body } = await host.post('/platform/rotations', { ownerAuth });
    assert.equal(status, 200, JSON.stringify(body));
    assert.equal(generation(), 2);
    await host.manager.stop();
    await host.assertNothingLeft();
  });
});
