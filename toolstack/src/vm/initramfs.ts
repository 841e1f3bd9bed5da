import { readdirSync, readFileSync } from 'node:fs';
import { basename, join } from 'node:path';
import { gzipSync } from 'node:zlib';
import { ToolstackError } from '../error.js';
import { cpioArchive } from './cpio.js';

/** What the worker's VM has: its root, its port, and the host's random numbers. */
const MODULES = ['virtio_pci', 'virtio_blk', 'virtio_console', 'virtio_rng'];

export interface InitramfsParts {
  /** Directory of the kernel's modules, `/lib/modules/<release>`. */
  readonly modules: string;
  /** A busybox that needs no library. */
  readonly busybox: string;
  /** The command line of the VM's only program, on its root. */
  readonly command: readonly string[];
  readonly environment: Readonly<Record<string, string>>;
}

/**
 * The small file system that the kernel starts with: it loads the VM's few drivers, mounts the root and becomes the
 * worker. @throws ToolstackError `corrupt` where the kernel lacks a module
 */
export function buildInitramfs(parts: InitramfsParts): Buffer {
  const modules = kernelModules(parts.modules, MODULES);
  const archive = cpioArchive([
    { name: 'init', content: Buffer.from(initScript(parts, [...modules.keys()])), executable: true },
    { name: 'busybox', content: readFileSync(parts.busybox), executable: true },
    { name: 'modules' },
    ...[...modules].map(([name, content]) => ({ name: `modules/${name}.ko`, content })),
    ...['dev', 'proc', 'root'].map((name) => ({ name })),
  ]);
  return gzipSync(archive);
}

/** Whatever fails in it ends the VM: the kernel does not go on without its first program. */
function initScript({ command, environment }: InitramfsParts, modules: readonly string[]): string {
  const variables = Object.entries(environment).map(([name, value]) => `${name}=${value}`);
  return `#!/busybox sh
set -e
for module in ${modules.join(' ')}; do /busybox insmod /modules/$module.ko; done
/busybox mount -t devtmpfs dev /dev
/busybox mount -t proc proc /proc
echo 1 >/proc/sys/kernel/modules_disabled
# No key is made in a VM that has not got random numbers from its host.
/busybox dd if=/dev/hwrng of=/dev/urandom bs=64 count=1 iflag=fullblock 2>/dev/null
/busybox mount -t ext4 -o ro,nodev,nosuid /dev/vda /root
/busybox mount -o move /proc /root/proc
ports=$(echo /dev/vport*p1)
exec 3<>"$ports"
/busybox umount -l /dev
exec /busybox env -i ${variables.map(quoted).join(' ')} /busybox switch_root /root ${command.map(quoted).join(' ')}
`;
}

function quoted(word: string): string {
  return `'${word.replaceAll("'", "'\\''")}'`;
}

/**
 * Modules of a kernel and what they depend on, in the order in which they can be loaded.
 * @param directory `/lib/modules/<release>` @throws ToolstackError `corrupt` where one is missing
 */
export function kernelModules(directory: string, wanted: readonly string[]): Map<string, Buffer> {
  return inLoadingOrder(modulesIn(directory), wanted);
}

/** By name, with `_` for `-`: a dependency may be written either way. */
function modulesIn(directory: string): Map<string, string> {
  const files = readdirSync(directory, { recursive: true, encoding: 'utf8' });
  return new Map(
    files
      .filter((file) => file.endsWith('.ko'))
      .map((file) => [basename(file, '.ko').replaceAll('-', '_'), join(directory, file)]),
  );
}

/** With what they depend on, that first. */
function inLoadingOrder(files: ReadonlyMap<string, string>, wanted: readonly string[]): Map<string, Buffer> {
  const found = new Map<string, Buffer>();
  const add = (name: string): void => {
    if (found.has(name)) return;
    const path = files.get(name);
    if (path === undefined) {
      throw new ToolstackError(
        'corrupt',
        `the kernel package has no module ${name}; use Debian's linux-image-cloud-amd64`,
      );
    }
    const content = readFileSync(path);
    for (const dependency of dependenciesOf(content)) add(dependency);
    found.set(name, content);
  };
  for (const name of wanted) add(name);
  return found;
}

/** As the module itself says: `depends=a,b` in its .modinfo section, strings that end with a NUL. */
function dependenciesOf(module: Buffer): string[] {
  const start = module.indexOf('\0depends=') + '\0depends='.length;
  const names = module.toString('latin1', start, module.indexOf(0, start));
  return names === '' ? [] : names.replaceAll('-', '_').split(',');
}
