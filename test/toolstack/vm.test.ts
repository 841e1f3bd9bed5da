import assert from 'node:assert/strict';
import { mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { gunzipSync } from 'node:zlib';
import fc from 'fast-check';
import type { ToolstackError } from 'vtpm-toolstack/error';
import { chooseAccelerator, runsVms } from 'vtpm-toolstack/vm/accelerator';
import { type ArchiveEntry, cpioArchive } from 'vtpm-toolstack/vm/cpio';
import { buildInitramfs } from 'vtpm-toolstack/vm/initramfs';
import { QEMU_TEMPLATE, withAccelerator } from 'vtpm-toolstack/vm/qemu';
import { readVmManifest } from 'vtpm-toolstack/vm/sources';
import {
  buildStubImage,
  removeDirectory,
  StubManager,
  SupervisorProcess,
  temporaryDirectory,
} from './supervisor-fixture.js';

/** cpio(5), "New ASCII Format". */
function entriesOf(archive: Buffer): { name: string; mode: number; content: Buffer }[] {
  const entries = [];
  for (let at = 0; ; ) {
    assert.equal(archive.toString('latin1', at, at + 6), '070701');
    const field = (index: number): number =>
      Number.parseInt(archive.toString('latin1', at + 6 + 8 * index, at + 14 + 8 * index), 16);
    const name = archive.toString('utf8', at + 110, at + 110 + field(11) - 1);
    const start = (at + 110 + field(11) + 3) & ~3;
    if (name === 'TRAILER!!!') return entries;
    entries.push({ name, mode: field(1), content: archive.subarray(start, start + field(6)) });
    at = (start + field(6) + 3) & ~3;
  }
}

describe('the image for workers in VMs', () => {
  let directory: string;
  beforeEach(() => {
    directory = temporaryDirectory();
  });
  afterEach(() => removeDirectory(directory));

  it('has an initramfs archive that holds what was put into it', () => {
    const name = fc.stringMatching(/^[a-z_.é/-]{1,40}$/).filter((text) => text !== 'TRAILER!!!');
    const file: fc.Arbitrary<ArchiveEntry> = fc.record(
      { name, content: fc.uint8Array({ maxLength: 100 }), executable: fc.boolean() },
      { requiredKeys: ['name'] },
    );
    fc.assert(
      fc.property(fc.array(file), (files) => {
        const found = entriesOf(cpioArchive(files));
        assert.deepEqual(
          found.map(({ name, mode, content }) => [name, mode, Buffer.from(content).toString('hex')]),
          files.map(({ name, content, executable }) => [
            name,
            content ? (executable ? 0o100555 : 0o100444) : 0o40755,
            Buffer.from(content ?? []).toString('hex'),
          ]),
        );
      }),
    );
  });

  /** A kernel package's modules as far as they are looked at. */
  function modules(depends: Record<string, string>): string {
    for (const [name, names] of Object.entries(depends)) {
      mkdirSync(join(directory, 'modules/6.1/kernel', name), { recursive: true });
      writeFileSync(
        join(directory, 'modules/6.1/kernel', name, `${name}.ko`),
        `ELF\0license=GPL\0depends=${names}\0name=${name}\0`,
      );
    }
    writeFileSync(join(directory, 'busybox'), 'busybox');
    return join(directory, 'modules');
  }

  const initramfs = (path: string): Buffer =>
    buildInitramfs({
      modules: path,
      busybox: join(directory, 'busybox'),
      command: ['/usr/bin/node', "it's"],
      environment: { A: '1' },
    });

  it('loads each driver after those that it needs, and runs the worker with its environment alone', () => {
    const path = modules({
      virtio_ring: '',
      virtio: 'virtio_ring',
      'virtio-rng': 'virtio',
      virtio_blk: 'virtio,virtio-ring',
      virtio_console: 'virtio',
      virtio_pci: 'virtio_ring,virtio,virtio_pci_legacy_dev',
      virtio_pci_legacy_dev: '',
      virtio_net: 'virtio',
    });
    const entries = entriesOf(gunzipSync(initramfs(path)));
    const script = entries.find(({ name }) => name === 'init')?.content.toString() ?? '';
    assert.match(
      script,
      /^for module in virtio_ring virtio virtio_pci_legacy_dev virtio_pci virtio_blk virtio_console virtio_rng; do/m,
    );
    assert.match(
      script,
      /^exec \/busybox env -i 'A=1' \/busybox switch_root \/root '\/usr\/bin\/node' 'it'\\''s'$/m,
    );
    assert.equal(entries.filter(({ name }) => name.startsWith('modules/')).length, 7);
    assert.ok(!entries.some(({ name }) => name.includes('virtio_net')));
  });

  it('is not made of a kernel that lacks a driver', () => {
    assert.throws(() => initramfs(modules({ virtio_pci: 'none' })), {
      code: 'corrupt',
      message: /no module none; use Debian's linux-image-cloud-amd64/,
    });
  });

  it('is refused where its manifest is missing, damaged or newer, with the command that makes it', () => {
    const cases: [string | undefined, ToolstackError['code']][] = [
      [undefined, 'missing-package'],
      ['{', 'corrupt'],
      ['{"format":1}', 'corrupt'],
      ['{"format":2}', 'newer-format'],
    ];
    for (const [content, code] of cases) {
      if (content !== undefined) writeFileSync(join(directory, 'vm.json'), content);
      assert.throws(() => readVmManifest(directory), { code, message: /: vtpmctl image build-vm$/ });
    }
  });

  it('says why there is no KVM where it was asked for, and what may be in the way', () => {
    const message = new RegExp(
      `^vm-accelerator is kvm, and .*ENOENT.*'${directory}/kvm'; .*KVM module.*DeviceAllow=.*tcg$`,
    );
    assert.throws(() => chooseAccelerator('kvm', join(directory, 'kvm')), {
      code: 'missing-package',
      message,
    });
    assert.equal(chooseAccelerator('auto', join(directory, 'kvm')), 'tcg');
  });

  it('gives the VM a read-only disk, one port, random numbers, and nothing else', () => {
    const values = (option: string): string[] =>
      QEMU_TEMPLATE.filter((_, index) => QEMU_TEMPLATE[index - 1] === option);
    assert.deepEqual(
      values('-device').map((text) => text.split(',')[0]),
      ['virtio-blk-pci', 'virtio-rng-pci', 'virtio-serial-pci', 'virtserialport'],
    );
    assert.match(values('-drive').join(), /^if=none,id=root,format=raw,readonly=on,/);
    assert.deepEqual(values('-monitor'), ['none']);
    for (const option of ['-nodefaults', '-no-user-config', '-no-reboot', '-sandbox']) {
      assert.ok(QEMU_TEMPLATE.includes(option), option);
    }
    for (const option of ['-nic', '-netdev', '-net', '-usb', '-vnc', '-qmp', '-fsdev', '-virtfs']) {
      assert.ok(!QEMU_TEMPLATE.includes(option), option);
    }
    const { length } = withAccelerator(QEMU_TEMPLATE, 'kvm').filter((text) => !QEMU_TEMPLATE.includes(text));
    assert.equal(length, 1, 'the accelerator alone is filled in');
  });

  it('takes KVM only from a processor that says that it runs VMs', () => {
    const flags = (text: string): string => `model name\t: vmx\nflags\t\t: fpu ${text} sse\nbugs\t\t: svm\n`;
    assert.equal(runsVms(flags('vmx')), true);
    assert.equal(runsVms(flags('svm')), true);
    assert.equal(runsVms(flags('vmxx')), false);
    assert.equal(runsVms(flags('')), false);
  });
});

describe('isolation vm where no image was made', function () {
  this.timeout(60_000);

  it('is refused when a vTPM is created and when one is started, with what to type; the others go on', async () => {
    const home = temporaryDirectory();
    const image = temporaryDirectory();
    const supervisor = await new SupervisorProcess(home, await buildStubImage(image)).ready();
    const manager = new StubManager(supervisor.paths);
    await manager.start();
    try {
      const created = await supervisor.create('web1', { isolation: 'vm' });
      assert.equal(created.body.error?.code, 'missing-package', JSON.stringify(created.body));
      assert.match(
        created.body.error.message,
        /there is no image for --isolation vm; make it: vtpmctl image build-vm$/,
      );
      assert.equal((await supervisor.create('web2')).status, 201);
      assert.equal((await supervisor.call('POST', '/vtpms/web2/start')).status, 200);
    } finally {
      await supervisor.end('SIGKILL');
      await manager.stop();
      removeDirectory(home);
      removeDirectory(image);
    }
  });
});
