import assert from 'node:assert/strict';
import { existsSync, readdirSync } from 'node:fs';
import { dirname } from 'node:path';
import fc from 'fast-check';
import { checkDoors, DOOR_KINDS, entrancesOf, powerOf } from 'vtpm-toolstack/supervisor/door-kinds';
import {
  buildStubImage,
  connectDoor,
  exchange,
  removeDirectory,
  StubManager,
  SupervisorProcess,
  temporaryDirectory,
} from './supervisor-fixture.js';

describe('which doors a vTPM has', function () {
  this.timeout(60_000);
  let image: string;
  let home: string;
  let supervisor: SupervisorProcess;
  let manager: StubManager;

  before(async () => {
    image = temporaryDirectory();
    const manifest = await buildStubImage(image);
    home = temporaryDirectory();
    supervisor = await new SupervisorProcess(home, manifest, ['--log-format', 'json']).ready();
    manager = new StubManager(supervisor.paths);
    await manager.start();
  });
  after(async () => {
    await supervisor.end('SIGKILL');
    await manager.stop();
    removeDirectory(home);
    removeDirectory(image);
  });

  it('are tpm and tcti where nothing is said', async () => {
    const { body } = await supervisor.create('plain');
    assert.deepEqual(body.doors, ['tpm', 'tcti']);
    const { sockets } = (await supervisor.call('POST', '/vtpms/plain/start')).body;
    assert.deepEqual(readdirSync(dirname(sockets.tpm)).sort(), ['tcti.sock', 'tcti.sock.ctrl', 'tpm.sock']);
    await supervisor.call('POST', '/vtpms/plain/stop');
  });

  it('can be fewer, and a door that it does not have has no socket', async () => {
    assert.equal((await supervisor.create('raw', { doors: ['tpm'] })).status, 201);
    const { sockets } = (await supervisor.call('POST', '/vtpms/raw/start')).body;
    assert.equal(sockets.tcti, null);
    assert.deepEqual(readdirSync(dirname(sockets.tpm)), ['tpm.sock']);
    const guest = await connectDoor(sockets.tpm);
    assert.equal(await exchange(guest, 'x'), 'x');
    const refused = await supervisor.call('PATCH', '/vtpms/raw', { doors: ['tcti'] });
    assert.deepEqual([refused.status, refused.body.error.code], [409, 'not-stopped']);
    // They outlive the program of the supervisor, with who stands in them.
    assert.equal((await supervisor.call('POST', '/upgrade')).status, 200);
    assert.equal(await exchange(guest, 'y'), 'y');
    assert.deepEqual(readdirSync(dirname(sockets.tpm)), ['tpm.sock']);
    guest.destroy();
    await supervisor.call('POST', '/vtpms/raw/stop');
    assert.deepEqual((await supervisor.call('PATCH', '/vtpms/raw', { doors: ['tcti'] })).body.doors, [
      'tcti',
    ]);
    const changed = (await supervisor.call('POST', '/vtpms/raw/start')).body.sockets;
    assert.equal(changed.tpm, null);
    assert.ok(existsSync(changed.tcti) && existsSync(`${changed.tcti}.ctrl`) && !existsSync(sockets.tpm));
    await supervisor.call('POST', '/vtpms/raw/stop');
  });

  it('are refused where they are no list of kinds', async () => {
    await supervisor.create('odd');
    for (const doors of [[], ['tpm', 'tpm'], ['tpm', 'vmm-data'], 'tpm', null, [['tpm']], { 0: 'tpm' }]) {
      for (const { status, body } of [
        await supervisor.create('never', { doors }),
        await supervisor.call('PATCH', '/vtpms/odd', { doors }),
      ]) {
        assert.deepEqual([status, body.error?.code], [400, 'bad-request'], JSON.stringify(doors));
        assert.match(body.error.message, /"doors" must be a list of at least one of tpm, tcti, control/);
      }
    }
    for (const change of [{}, { name: 'other' }, { doors: ['tpm'], isolation: 'none' }, [], null]) {
      const { status, body } = await supervisor.call('PATCH', '/vtpms/odd', change);
      assert.deepEqual([status, body.error?.code], [400, 'bad-request'], JSON.stringify(change));
    }
    assert.deepEqual((await supervisor.call('GET', '/vtpms/odd')).body.doors, ['tpm', 'tcti']);
  });

  it('never has mssim beside control, nor what only descriptors carry into the VM of a worker', () => {
    fc.assert(
      fc.property(fc.subarray([...DOOR_KINDS], { minLength: 1 }), (kinds) => {
        const isForVmm = kinds.includes('control') || kinds.includes('mssim');
        assert.equal(powerOf(kinds), isForVmm ? 'vmm' : 'on');
        assert.ok(!entrancesOf(kinds).includes('vmm-data'));
        if (kinds.includes('control') && kinds.includes('mssim')) {
          assert.throws(() => checkDoors(kinds, 'sandbox'), /could power the TPM of the VM off/);
        }
        const isPlain = kinds.every((kind) => kind === 'tpm' || kind === 'tcti');
        if (isPlain) checkDoors(kinds, 'vm');
        else assert.throws(() => checkDoors(kinds, 'vm'), { code: 'bad-request' });
      }),
    );
  });
});
