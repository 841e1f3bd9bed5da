import assert from 'node:assert/strict';
import { createHash } from 'node:crypto';
import { mkdirSync, mkdtempSync, readFileSync, rmSync, statSync } from 'node:fs';
import { createConnection } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { Installation } from '../support/installation.js';
import { EXTENDS, extendedWith, linuxGuest, TOOL_COUNT } from '../support/linux-guest.js';
import { QemuVm } from '../support/qemu.js';
import { startSwtpmForVmm } from '../support/swtpm.js';
import { TpmClient } from '../support/tpm-client.js';
import { pcrExtend, pcrRead } from '../support/tpm-commands.js';
import { until } from '../support/until.js';

const pcrOf = (answer: Buffer): string => answer.subarray(-32).toString('hex');

describe('unmodified QEMU with a vTPM (test:long)', function () {
  this.timeout(600_000);
  let installation: Installation;
  let directory: string;
  const machines: QemuVm[] = [];

  before(async () => {
    directory = mkdtempSync(join(tmpdir(), 'vtpm-qemu-'));
    installation = await Installation.create({ tpm: 'embedded' });
    await installation.startManager();
    await installation.startSupervisor({ args: ['--restart-burst', '1000'] });
  });
  afterEach(async () => {
    for (const machine of machines.splice(0)) await machine.kill();
  });
  after(async () => {
    await installation.destroy();
    rmSync(directory, { recursive: true, force: true });
  });

  const socket = (name: string, file: string): string =>
    join(installation.paths.supervisor.doors, name, file);
  async function create(name: string, ...args: string[]): Promise<void> {
    await installation.ctlJson(...['create', name, '--doors', 'tpm,control', '--startup', 'none'], ...args);
    await installation.ctlJson('start', name);
  }
  function boot(name: string, args: readonly string[], device: 'tpm-crb' | 'tpm-tis' = 'tpm-crb'): QemuVm {
    const monitor = join(directory, `monitor-${machines.length}-${name}`);
    const vm = new QemuVm(socket(name, 'control.sock'), monitor, { device, args });
    machines.push(vm);
    return vm;
  }
  async function ask(name: string, command: Buffer): Promise<Buffer> {
    const client = new TpmClient(createConnection(socket(name, 'tpm.sock')));
    const answer = await client.transmit(command);
    client.close();
    return answer;
  }

  for (const device of ['tpm-crb', 'tpm-tis'] as const) {
    it(`a Linux guest uses its ${device} while workers are killed under it`, async () => {
      await create(device);
      const vm = boot(device, linuxGuest(join(directory, device)), device);
      await vm.says(/DEVICE 2/);
      for (const tool of ['createprimary', 'unseal', 'quote']) {
        process.kill(await installation.workerPid(device), 'SIGKILL');
        await vm.says(new RegExp(`DONE ${tool}`));
      }
      await vm.says(/UNSEALED/);
      for (const count of [1, 20, 50, 80, EXTENDS - 1]) {
        await vm.says(new RegExp(`EXTENDED ${count}\\b`));
        process.kill(await installation.workerPid(device), 'SIGKILL');
      }
      await vm.says(/^END/m);
      assert.doesNotMatch(vm.output, /FAILED/);
      assert.equal(vm.output.match(/^DONE /gm)?.length, TOOL_COUNT + EXTENDS);
      let expected: Buffer = Buffer.alloc(32);
      for (let count = 1; count <= EXTENDS; count++) {
        const digest = Buffer.from(extendedWith(count), 'hex');
        expected = createHash('sha256').update(expected).update(digest).digest();
      }
      const view = (await installation.supervisord('GET', `/vtpms/${device}`)).body;
      assert.equal(view.state, 'running');
      assert.equal(pcrOf(await ask(device, pcrRead(16))), expected.toString('hex'), 'each extend once');
      assert.equal(await vm.quit(), 0);
    });
  }

  /** QEMU's own migration, into a file and from there. */
  async function migrate(from: QemuVm, file: string): Promise<void> {
    await from.monitor(`migrate "exec:cat > ${file}"`);
    await until('the state of the VM is saved', async () => {
      const status = await from.monitor('info migrate');
      assert.doesNotMatch(status, /failed/);
      return /completed/.test(status);
    });
  }

  for (const mode of ['reference', 'plain'] as const) {
    it(`migrate and -incoming carry the TPM (state blobs: ${mode})`, async () => {
      const name = `migrate-${mode}`;
      await create(name, '--state-blobs', mode);
      const file = join(directory, `${name}.state`);
      const source = boot(name, []);
      await until('SeaBIOS is done', () => source.output.includes('No bootable device'));
      await ask(name, pcrExtend(16, Buffer.alloc(32, 7)));
      const before = [0, 4, 7, 16].map(async (pcr) => pcrOf(await ask(name, pcrRead(pcr))));
      const values = await Promise.all(before);
      await migrate(source, file);
      assert.ok(statSync(file).size > 0);
      assert.equal(await source.quit(), 0);
      const target = boot(name, ['-incoming', `exec:cat ${file}`]);
      await until('the VM goes on', async () => /running/.test(await target.monitor('info status')));
      const after = await Promise.all([0, 4, 7, 16].map(async (pcr) => pcrOf(await ask(name, pcrRead(pcr)))));
      assert.deepEqual(after, values);
      assert.equal(await target.quit(), 0);
      // The same file once more: a reference works once.
      const again = boot(name, ['-incoming', `exec:cat ${file}`]);
      const status = await Promise.race([
        again.exited,
        until('it runs', async () => /running/.test(await again.monitor('info status').catch(() => ''))),
      ]);
      if (mode === 'reference') {
        assert.notEqual(status, true, 'a reference was used twice');
        assert.match(readFileSync(join(installation.paths.log, `vtpm-${name}.log`), 'utf8'), /refused/);
      }
    });
  }

  it('a VM comes from swtpm, and goes back there', async () => {
    await create('both', '--state-blobs', 'plain');
    const state = join(directory, 'tpm');
    const swtpm = async (monitor: string, ...args: string[]): Promise<QemuVm> => {
      mkdirSync(state, { recursive: true });
      const { control } = await startSwtpmForVmm(state);
      const vm = new QemuVm(control, join(directory, monitor), { args });
      machines.push(vm);
      return vm;
    };
    const [there, here] = [join(directory, 'there.state'), join(directory, 'here.state')];
    const first = await swtpm('first');
    await until('SeaBIOS is done', () => first.output.includes('No bootable device'));
    await migrate(first, there);
    assert.equal(await first.quit(), 0);
    rmSync(state, { recursive: true });
    const ours = boot('both', ['-incoming', `exec:cat ${there}`]);
    await until('the VM goes on', async () => /running/.test(await ours.monitor('info status')));
    const values = await Promise.all([0, 4, 7].map(async (pcr) => pcrOf(await ask('both', pcrRead(pcr)))));
    for (const value of values) assert.notEqual(value, '00'.repeat(32));
    await ask('both', pcrExtend(16, Buffer.alloc(32, 7)));
    await migrate(ours, here);
    assert.equal(await ours.quit(), 0);
    const back = await swtpm('back', '-incoming', `exec:cat ${here}`);
    await until('the VM goes on', async () => /running/.test(await back.monitor('info status')));
    await back.monitor('system_reset');
    await until('SeaBIOS is done', () => back.output.includes('No bootable device'));
    assert.equal(await back.quit(), 0);
  });
});
