import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { createConnection } from 'node:net';
import { join } from 'node:path';
import { isDeepStrictEqual } from 'node:util';
import { emptyCheckpoints } from '../support/empty-checkpoints.js';
import { Installation, run } from '../support/installation.js';
import { QemuVm } from '../support/qemu.js';
import { TpmClient } from '../support/tpm-client.js';
import { getRandom, pcrExtend, pcrRead } from '../support/tpm-commands.js';
import { until } from '../support/until.js';
import { Vmm } from '../support/vmm.js';

const STARTUP_CLEAR = '80010000000c000001440000';
const FAILURE = '80010000000a00000101';
const ZERO = '00'.repeat(32);

const pcrOf = (answer: Buffer): string => answer.subarray(-32).toString('hex');

describe('a VMM at control.sock', () => {
  let installation: Installation;
  let vm: QemuVm | undefined;
  let vmm: Vmm | undefined;

  before(async () => {
    installation = await Installation.create({ tpm: 'embedded' });
    await installation.start();
  });
  afterEach(async () => {
    await vm?.kill();
    vmm?.close();
    vm = vmm = undefined;
  });
  after(() => installation.destroy());

  const show = async (name: string) => (await installation.supervisord('GET', `/vtpms/${name}`)).body;
  const socket = (name: string, file: string): string =>
    join(installation.paths.supervisor.doors, name, file);
  const connect = (path: string): TpmClient => new TpmClient(createConnection({ path, allowHalfOpen: true }));
  async function start(name: string, ...args: string[]): Promise<void> {
    await installation.ctlJson(...['create', name, '--doors', 'tpm,tcti,control'], ...args);
    await installation.ctlJson('start', name);
  }
  /** The worker says it some milliseconds later. */
  async function expectStatus(name: string, expected: object): Promise<void> {
    await until(`${JSON.stringify(expected)} is shown`, async () =>
      isDeepStrictEqual((await show(name)).vmm, expected),
    );
  }
  async function readPcr(name: string, pcr: number): Promise<string | undefined> {
    const client = connect(socket(name, 'tpm.sock'));
    const answer = await client.transmit(pcrRead(pcr));
    client.close();
    return answer.readUInt32BE(6) === 0 ? pcrOf(answer) : undefined;
  }

  it("QEMU's firmware measures, a reset makes the PCRs fresh, and the door stays for the next VM", async () => {
    await start('qemu', '--startup', 'none');
    vm = new QemuVm(socket('qemu', 'control.sock'), join(installation.directory, 'monitor'));
    /** What SeaBIOS has measured when it has nothing left to do, for the so-many-th time. */
    const measured = async (boots: number): Promise<readonly (string | undefined)[]> => {
      await until('SeaBIOS is done', () => vm?.output.split('No bootable device').length === boots + 1);
      return Promise.all([0, 1, 2, 3, 4, 5, 6, 7].map((pcr) => readPcr('qemu', pcr)));
    };
    const first = await measured(1);
    for (const value of first) assert.notEqual(value, ZERO);
    await expectStatus('qemu', { connected: true, power: 'on', bufferSize: 0xf80, locality: 0 });
    const text = (await installation.ctl('show', 'qemu')).stdout;
    assert.match(text, /VMM\s+connected, TPM on, buffer 3968 bytes, locality 0/);
    const other = connect(socket('qemu', 'tpm.sock'));
    await other.transmit(pcrExtend(16, Buffer.alloc(32, 1)));
    await vm.monitor('system_reset');
    await until('the PCRs are fresh', async () => (await readPcr('qemu', 16)) === ZERO);
    assert.deepEqual(await measured(2), first, 'the same firmware measures the same');
    other.close();
    assert.equal(await vm.quit(), 0);
    await expectStatus('qemu', { connected: false, power: 'off', bufferSize: 0xf80, locality: 0 });
    vm = new QemuVm(socket('qemu', 'control.sock'), join(installation.directory, 'monitor2'), {
      device: 'tpm-tis',
    });
    assert.deepEqual(await measured(1), first);
  }).timeout(120_000);

  it('answers every verb of swtpm_ioctl, and swtpm_bios', async () => {
    await start('tools', '--startup', 'none', '--state-blobs', 'plain');
    const file = (name: string): string => join(installation.directory, name);
    const tool = async (...args: string[]) => {
      const { code, stdout, stderr } = await run('swtpm_ioctl', [
        ...['--unix', socket('tools', 'control.sock')],
        ...args,
      ]);
      return `${code} ${stdout}${stderr}`.trim();
    };
    const bios = async (...args: string[]) =>
      (await run('swtpm_bios', ['--tpm2', '--unix', socket('tools', 'tpm.sock'), ...args])).code;
    assert.equal(await tool('-c'), '0 ptm capability is 0x1ffff');
    assert.equal(await tool('-e'), '1 TPM result from PTM_GET_TPMESTABLISHED: 0xa');
    assert.equal(await tool('-i'), '0');
    assert.equal(await bios('-c', '-cs'), 0);
    assert.equal(await bios('-n', '-u'), 0);
    assert.equal(await tool('-e'), '0 tpmEstablished is 0');
    assert.equal(await tool('-h', 'hello world'), '0');
    assert.equal(await tool('-e'), '0 tpmEstablished is 1');
    assert.equal(await tool('-r', '2'), '1 TPM result from PTM_RESET_TPMESTABLISHED: 0x3d');
    assert.equal(await tool('-r', '3'), '0');
    assert.equal(await tool('-l', '4'), '0');
    for (const verb of ['-C', '-v']) assert.equal(await tool(verb), '0', verb);
    assert.equal(await tool('-g'), '0 ptm configuration flags: 0x0');
    assert.match(await tool('--info', '1'), /^0 .*"family":"2.0"/);
    assert.match(
      await tool('-b', '0'),
      /^0 TPM buffersize: 4096\nminimum size {2}: 2808\nmaximum size {2}: 4096/,
    );
    const pcr = await readPcr('tools', 17);
    for (const type of ['permanent', 'volatile', 'savestate']) {
      assert.equal(await tool('--save', type, file(type)), '0', type);
    }
    assert.equal(await tool('--stop'), '0');
    assert.match(await tool('-b', '3000'), /^0 TPM buffersize: 3000/);
    for (const type of ['permanent', 'volatile']) {
      assert.equal(await tool('--load', type, file(type)), '0', type);
    }
    assert.equal(await tool('-i'), '0');
    assert.equal(await readPcr('tools', 17), pcr);
    assert.equal(await tool('-s'), '0');
    assert.equal(await tool('-i'), '0', 'the door stays');
  });

  it('keeps both of its connections over kill -9 of the worker', async () => {
    await start('kill', '--startup', 'none');
    vmm = new Vmm(connect(socket('kill', 'control.sock')));
    assert.equal(await vmm.powerOn(0xb00), 0);
    await vmm.data!.transmit(STARTUP_CLEAR);
    await vmm.data!.transmit(pcrExtend(9, Buffer.alloc(32, 9)));
    const pcr = await readPcr('kill', 9);
    await vmm.answer('SET_LOCALITY', Buffer.from([1]));
    for (let kill = 0; kill < 3; kill++) {
      process.kill(await installation.workerPid('kill'), 'SIGKILL');
      assert.equal(pcrOf(await vmm.data!.transmit(pcrRead(9))), pcr);
      assert.equal(await vmm.ask('SET_BUFFERSIZE', Buffer.alloc(4)), '0000000000000b0000000af800001000');
    }
    await expectStatus('kill', { connected: true, power: 'on', bufferSize: 0xb00, locality: 1 });
    // Off survives as on does.
    await vmm.answer('STOP');
    process.kill(await installation.workerPid('kill'), 'SIGKILL');
    assert.equal((await vmm.data!.transmit(getRandom())).toString('hex'), FAILURE);
    assert.equal(await vmm.result('GET_TPMESTABLISHED'), 0x0a);
    assert.equal(await vmm.powerOn(0xb00), 0);
    assert.equal((await show('kill')).state, 'running');
  });

  it('gets a TPM that is lost back with INIT: a new run of its VM, with fresh PCRs', async () => {
    await start('lost', '--startup', 'none');
    vmm = new Vmm(connect(socket('lost', 'control.sock')));
    assert.equal(await vmm.powerOn(0xf80), 0);
    await vmm.data!.transmit(STARTUP_CLEAR);
    await vmm.data!.transmit(pcrExtend(9, Buffer.alloc(32, 9)));
    const before = await show('lost');
    emptyCheckpoints(installation.supervisor?.pid ?? 0);
    process.kill(await installation.workerPid('lost'), 'SIGKILL');
    assert.equal((await vmm.data!.transmit(getRandom())).toString('hex'), FAILURE);
    await until('it is known to be lost', async () => (await show('lost')).state === 'lost');
    // The guest cannot bring it back.
    assert.equal((await vmm.data!.transmit(STARTUP_CLEAR)).toString('hex'), FAILURE);
    assert.equal(await vmm.result('GET_TPMESTABLISHED'), 0x0a);
    assert.equal(await vmm.result('STOP'), 0);
    assert.equal(
      await vmm.ask('SET_BUFFERSIZE', Buffer.from([0, 0, 0xb, 0])),
      '0000000000000b0000000af800001000',
    );
    assert.equal(await vmm.result('INIT', Buffer.alloc(4)), 0);
    assert.equal((await vmm.data!.transmit(STARTUP_CLEAR)).readUInt32BE(6), 0);
    assert.equal(pcrOf(await vmm.data!.transmit(pcrRead(9))), ZERO);
    const after = await show('lost');
    assert.deepEqual([after.state, after.reason], ['running', null]);
    assert.notEqual(after.vmRunId, before.vmRunId);
    await expectStatus('lost', { connected: true, power: 'on', bufferSize: 0xb00, locality: 0 });
  });

  it('goes on over an upgrade of the supervisor, and a kill -9 of the worker after it', async () => {
    await start('upgrade', '--startup', 'none');
    vmm = new Vmm(connect(socket('upgrade', 'control.sock')));
    assert.equal(await vmm.powerOn(0xf80), 0);
    await vmm.data!.transmit(STARTUP_CLEAR);
    await vmm.data!.transmit(pcrExtend(9, Buffer.alloc(32, 9)));
    const pcr = await readPcr('upgrade', 9);
    const status = { connected: true, power: 'on', bufferSize: 0xf80, locality: 0 };
    await expectStatus('upgrade', status);
    assert.equal((await installation.supervisord('POST', '/upgrade')).status, 200);
    assert.deepEqual((await show('upgrade')).vmm, status);
    process.kill(await installation.workerPid('upgrade'), 'SIGKILL');
    assert.equal(pcrOf(await vmm.data!.transmit(pcrRead(9))), pcr);
    assert.equal(await vmm.result('INIT', Buffer.alloc(4)), 0);
    await vmm.data!.transmit(STARTUP_CLEAR);
    assert.equal(pcrOf(await vmm.data!.transmit(pcrRead(9))), ZERO);
  });

  it('Cloud Hypervisor: a stray descriptor with each request, one receive, 100 ms', async () => {
    await start('ch', '--startup', 'none');
    vmm = new Vmm(connect(socket('ch', 'control.sock')));
    assert.equal(await vmm.setDataFd(), 0);
    // Read as one u64: the first four bytes must be 0.
    assert.equal(await vmm.askWithStray('GET_CAPABILITY'), '000000000001ffff');
    for (const command of ['STOP', 'INIT', 'GET_TPMESTABLISHED', 'STOP', 'INIT'] as const) {
      const answer = await vmm.askWithStray(command, command === 'INIT' ? Buffer.alloc(4) : undefined);
      assert.equal(answer.slice(0, 8), '00000000', command);
    }
    const { data } = vmm;
    for (const command of [STARTUP_CLEAR, getRandom(), pcrExtend(8, Buffer.alloc(32, 8)), pcrRead(8)]) {
      // As one segment: nothing follows in another one.
      const whole = new Promise<Buffer>((resolve) => data!.socket.once('data', resolve));
      data!.send(command);
      const segment = await whole;
      assert.equal(segment.length, segment.readUInt32BE(2));
      assert.equal(segment.readUInt32BE(6), 0);
    }
    assert.equal(await vmm.askWithStray('SHUTDOWN'), '00000000');
    const worker = readFileSync(join(installation.paths.log, 'vtpm-ch.log'), 'utf8');
    assert.doesNotMatch(worker, /"level":50/);
  });
});
