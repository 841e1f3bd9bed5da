import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { chmodSync, readFileSync } from 'node:fs';
import { Socket } from 'node:net';
import { join } from 'node:path';
import { socketPair } from 'vtpm-common/libc';
import { connectGuest } from 'vtpm-quickstart/guest';
import { QEMU_TEMPLATE, withAccelerator } from 'vtpm-toolstack/vm/qemu';
import { FrameReader } from 'vtpmd/vm/frames';
import { Installation, run } from '../support/installation.js';
import { until } from '../support/until.js';
import { buildVmImage } from '../support/vm-image.js';

describe('a worker in a VM of its own (test:long)', function () {
  this.timeout(900_000);
  let installation: Installation;
  let digest: string;

  before(async () => {
    installation = await Installation.create();
    await installation.startManager();
    digest = await buildVmImage(installation);
    await installation.startSupervisor({
      env: { VTPM_VM_ACCELERATOR: 'tcg' },
    });
  });
  after(() => installation?.destroy());

  const state = async (name: string): Promise<unknown> =>
    (await installation.supervisord('GET', `/vtpms/${name}`)).body.state;

  it('does the main job: commands, Saves, a manager that restarts, kill -9 of QEMU, the same TPM again', async () => {
    const guest = await connectGuest(await installation.vtpm('web1', '--isolation', 'vm'));
    const shown = await installation.ctlJson('show', 'web1');
    const { pid, layers, isolation } = shown.worker as { pid: number; layers: string[]; isolation: string };
    assert.equal(isolation, 'vm');
    assert.equal(readFileSync(`/proc/${pid}/comm`, 'utf8').trim(), 'qemu-system-x86');
    for (const layer of ['vm:tcg', 'namespace:net', 'namespace:pid', 'read-only-root', 'no-capabilities']) {
      assert.ok(layers.includes(layer), `${layer} in ${layers.join(', ')}`);
    }
    const record = (await installation.admin('GET', `/vtpms/${String(shown.id)}`)).body;
    const session = record.session as { imageDigest: string; isolation: string };
    assert.deepEqual([session.imageDigest, session.isolation], [digest, 'vm'], 'as the ticket named it');

    await guest.defineCounter();
    await guest.extend(16, 'measured');
    const before = [await guest.makeKey(), await guest.endorsement()];
    await installation.killManager();
    await installation.startManager();
    const counter = await guest.counter();
    await guest.close();
    const tool = await installation.ctl('exec', 'web1', '--', 'tpm2_getrandom', '--hex', '8');
    assert.match(tool.stdout, /^[0-9a-f]{16}$/, tool.stderr);

    process.kill(pid, 'SIGKILL');
    await until('the loss of the VM is seen', async () => (await state('web1')) === 'crashed');
    await installation.ctlJson('start', 'web1');
    const again = await connectGuest(installation.door('web1'));
    assert.deepEqual([await again.keyFingerprint(), await again.endorsement()], before);
    assert.ok((await again.counter()) >= counter);
    assert.equal(await again.pcr(16), '0'.repeat(64), 'a new VM run starts with fresh PCRs');
    await again.close();
    await installation.ctlJson('stop', 'web1');
    assert.equal((await installation.ctlJson('show', 'web1')).note ?? null, null, 'stopped in order');
  });

  it('goes on through an upgrade of the supervisor, with its guest', async () => {
    const guest = await connectGuest(await installation.vtpm('up1', '--isolation', 'vm'));
    await guest.defineCounter();
    await guest.extend(16, 'measured');
    const before = [await guest.pcr(16), await guest.counter(), await installation.workerPid('up1')];
    await installation.ctlJson('supervisor', 'upgrade');
    assert.deepEqual(
      [await guest.pcr(16), await guest.counter(), await installation.workerPid('up1')],
      before,
    );
    await guest.close();
    const stopped = (await installation.supervisord('POST', '/vtpms/up1/stop')).body;
    assert.deepEqual([stopped.state, stopped.reason], ['stopped', null]);
  });

  it('gets no state where a part of it was changed', async () => {
    const root = join(installation.paths.supervisor.vm, 'root');
    chmodSync(root, 0o600);
    const { code } = await run('sh', [
      '-c',
      `printf x | dd of=${root} bs=1 seek=4096 conv=notrunc && touch ${join(root, '../vm.json')}`,
    ]);
    assert.equal(code, 0);
    await installation.ctlJson('create', 'web2', '--isolation', 'vm');
    const refused = await installation.ctl('start', 'web2');
    assert.equal(refused.code !== 0, true);
    assert.match(refused.stderr, /image/);
    await buildVmImage(installation);
  });

  /** Starts the VM as its relay does, without a sandbox. @returns whether the worker said anything on its port */
  async function boots(args: readonly string[]): Promise<boolean> {
    const parts = installation.paths.supervisor.vm;
    const [program = '', ...rest] = withAccelerator(args, 'tcg').map((argument) =>
      argument
        .replace(/\/vm\/(kernel|initramfs|root)/, `${parts}/$1`)
        .replace('/vm/firmware', '/usr/share/qemu'),
    );
    const [ours, theirs] = socketPair();
    const qemu = spawn(program, rest, { stdio: ['ignore', 'ignore', 'ignore', theirs] });
    const port = new Socket({ fd: ours });
    const reader = new FrameReader();
    const ended = once(qemu, 'exit').then(() => false);
    const spoke = new Promise<boolean>((resolve) => {
      port.on('data', (chunk: Buffer) => {
        if (reader.push(chunk).length > 0) resolve(true);
      });
    });
    // The manager link: the worker begins when it is there.
    port.write(Buffer.from('0000000100000000', 'hex'));
    try {
      return await Promise.race([spoke, ended]);
    } finally {
      qemu.kill('SIGKILL');
      port.destroy();
    }
  }

  it('does not begin without random numbers from its host', async () => {
    const device = QEMU_TEMPLATE.indexOf('virtio-rng-pci,rng=random');
    const without = QEMU_TEMPLATE.filter((_, index) => index !== device && index !== device - 1);
    assert.equal(await boots(without), false);
    assert.equal(await boots(QEMU_TEMPLATE), true, 'positive control');
  });
});
