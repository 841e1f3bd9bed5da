import { type ChildProcess, execFileSync, spawn } from 'node:child_process';
import { once } from 'node:events';
import { cpSync, mkdirSync, readdirSync, readFileSync, statSync, writeFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { type ArchiveEntry, cpioArchive } from 'vtpm-toolstack/vm/cpio';
import { unpack } from 'vtpm-toolstack/vm/debian';
import { kernelModules } from 'vtpm-toolstack/vm/initramfs';
import { REPOSITORY } from './installation.js';
import { reapAtExit } from './reap.js';
import { until } from './until.js';
import { debianPackage } from './vm-image.js';

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
    const kernel = unpack(debianPackage('linux-image-'), join(directory, 'kernel'));
    const busybox = unpack(debianPackage('busybox-static'), join(directory, 'busybox'));
    const modules = kernelModules(join(kernel, 'lib/modules'), MODULES);
    const tree = join(directory, 'tree');
    for (const name of ['dev', 'proc', 'sys', 'modules', 'tmp'])
      mkdirSync(join(tree, name), { recursive: true });
    for (const [name, content] of modules) writeFileSync(join(tree, 'modules', `${name}.ko`), content);
    writeFileSync(join(tree, 'init'), INIT([...modules.keys()]), { mode: 0o755 });
    writeFileSync(join(tree, 'guest.mjs'), GUEST);
    copy(join(busybox, 'bin/busybox'), join(tree, 'busybox'));
    for (const file of needed(TOOLS)) copy(file, join(tree, file));
    copyFrontend(join(tree, 'frontend'));
    const initramfs = join(directory, 'initramfs');
    writeFileSync(initramfs, cpioArchive(entriesOf(tree)));
    const boot = readdirSync(join(kernel, 'boot')).find((name) => name.startsWith('vmlinuz-'))!;
    return new ProxyGuest(join(kernel, 'boot', boot), initramfs, door);
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

/** Programs, and all that the loader wants for them and for what they load by name. */
function needed(programs: readonly string[]): string[] {
  const plugins = ['libtss2-tcti-device.so.0', 'libtss2-tctildr.so.0'].map(
    (name) => `/usr/lib/x86_64-linux-gnu/${name}`,
  );
  const files = new Set([...programs, ...plugins]);
  for (const [, path] of execFileSync('ldd', [...files], { encoding: 'utf8' }).matchAll(
    /(\/[^\s:]+)(?= \()/g,
  )) {
    files.add(path!);
  }
  return [...files];
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

function copy(from: string, to: string): void {
  mkdirSync(dirname(to), { recursive: true });
  cpSync(from, to, { dereference: true });
}

function entriesOf(tree: string): ArchiveEntry[] {
  return readdirSync(tree, { recursive: true, encoding: 'utf8' })
    .sort()
    .map((name) => {
      const path = join(tree, name);
      const { mode } = statSync(path);
      return statSync(path).isDirectory()
        ? { name }
        : { name, content: readFileSync(path), executable: (mode & 0o111) !== 0 };
    });
}
