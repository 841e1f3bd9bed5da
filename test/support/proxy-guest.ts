import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { cpSync, mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { kernelModules } from 'vtpm-toolstack/vm/initramfs';
import { bootable } from './guest-tree.js';
import { REPOSITORY } from './installation.js';
import { reapAtExit } from './reap.js';
import { until } from './until.js';

const MODULES = ['virtio_pci', 'virtio_console', 'tpm_vtpm_proxy'];
const TOOLS = ['/usr/bin/tpm2', process.execPath];

/** The guest's first program: a TPM of its kernel's, served over its port, and a program that uses it. */
const INIT = (modules: readonly string[]): string => `#!/busybox sh
set -e
for module in ${modules.join(' ')}; do /busybox insmod /modules/$module.ko; done
/busybox mount -t devtmpfs dev /dev
/busybox mount -t proc proc /proc
/busybox mount -t sysfs sys /sys
node=${process.execPath}
$node /frontend/bin/vtpm-frontend.js proxy /dev/vport0p1 >/device &
proxy=$!
until [ -s /device ] && [ -c $(/busybox cat /device) ]; do /busybox sleep 0.1; done
echo "PROXY $(/busybox cat /device)"
$node /guest.mjs $(/busybox cat /device)
echo "TOOL $(/usr/bin/tpm2 getrandom -T device:$(/busybox cat /device) --hex 8)"
/busybox kill $proxy
until [ ! -c $(/busybox cat /device) ]; do /busybox sleep 0.1; done
echo GONE
/busybox poweroff -f
`;

/** How often the guest extends PCR 16. */
export const EXTENDS = 200;

/** The number of the extend, as a SHA-256 digest in hex. */
export function extendedWith(count: number): string {
  return count.toString(16).padStart(64, '0');
}

const GUEST = `import { openSync, readSync, writeSync } from 'node:fs';
const device = openSync(process.argv[2], 'r+');
const run = (hex) => {
  writeSync(device, Buffer.from(hex, 'hex'));
  const answer = Buffer.alloc(4096);
  return answer.subarray(0, readSync(device, answer)).toString('hex');
};
for (let count = 1; count <= ${EXTENDS}; count++) {
  const digest = count.toString(16).padStart(64, '0');
  const answer = run('80020000004100000182000000100000000940000009000000000000000001000b' + digest);
  console.log('EXTENDED ' + count + ' ' + answer);
}
console.log('RANDOM ' + run('80010000000c0000017b0008'));
`;

/** A Linux guest under QEMU whose kernel proxies a TPM, with its port at a vTPM's raw door. */
export class ProxyGuest {
  /** What it said on its console. */
  console = '';
  readonly ended: Promise<unknown>;
  readonly #qemu: ChildProcess;

  static start(directory: string, door: string): ProxyGuest {
    const { kernel, initramfs } = bootable(
      directory,
      (kernelFiles) => INIT([...modulesOf(kernelFiles).keys()]),
      TOOLS,
      (tree, kernelFiles) => {
        mkdirSync(join(tree, 'modules'));
        for (const [name, content] of modulesOf(kernelFiles)) {
          writeFileSync(join(tree, 'modules', `${name}.ko`), content);
        }
        writeFileSync(join(tree, 'guest.mjs'), GUEST);
        copyFrontend(join(tree, 'frontend'));
      },
    );
    return new ProxyGuest(kernel, initramfs, door);
  }

  private constructor(kernel: string, initramfs: string, door: string) {
    this.#qemu = reapAtExit(
      spawn(
        'qemu-system-x86_64',
        [
          ...['-nodefaults', '-no-user-config', '-no-reboot', '-display', 'none', '-monitor', 'none'],
          ...['-machine', 'q35', '-accel', 'tcg', '-cpu', 'max', '-m', '768M'],
          ...['-kernel', kernel, '-initrd', initramfs, '-append', 'console=ttyS0 quiet panic=-1'],
          ...['-serial', 'stdio'],
          ...['-chardev', `socket,id=door,path=${door}`, '-device', 'virtio-serial-pci'],
          ...['-device', 'virtserialport,chardev=door,name=vtpm.0'],
        ],
        { stdio: ['ignore', 'pipe', 'inherit'] },
      ),
    );
    this.#qemu.stdout!.setEncoding('utf8').on('data', (text: string) => {
      this.console += text;
    });
    this.ended = once(this.#qemu, 'exit');
  }

  /** Waits for a line of its console. */
  async says(pattern: RegExp): Promise<RegExpExecArray> {
    return until(
      `the guest says ${pattern}`,
      () => {
        if (this.#qemu.exitCode !== null) throw new Error(`the guest ended: ${this.console.slice(-4000)}`);
        return pattern.exec(this.console) ?? undefined;
      },
      180_000,
    );
  }

  async stop(): Promise<void> {
    this.#qemu.kill('SIGKILL');
    await this.ended;
  }
}

function modulesOf(kernelFiles: string): Map<string, Buffer> {
  return kernelModules(join(kernelFiles, 'lib/modules'), MODULES);
}

function copyFrontend(target: string): void {
  const source = join(REPOSITORY, 'frontend-driver');
  for (const part of ['bin', 'dist', 'package.json'])
    cpSync(join(source, part), join(target, part), { recursive: true });
  for (const name of ['commander', 'koffi', '@koromix/koffi-linux-x64']) {
    const from = join(REPOSITORY, 'node_modules', name);
    cpSync(from, join(target, 'node_modules', name), { recursive: true, dereference: true });
  }
}
