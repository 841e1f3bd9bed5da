import { execFileSync } from 'node:child_process';
import {
  chmodSync,
  copyFileSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  renameSync,
  rmSync,
  statSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { privateDirectory } from 'vtpm-common';
import { ToolstackError } from '../error.js';
import { installedDigest } from '../supervisor/image.js';
import { collectSources, type ImageSources } from '../supervisor/image-sources.js';
import { fetchPackages, nameOf, type Packages, unpack } from './debian.js';
import { buildInitramfs } from './initramfs.js';
import { bundledManifest, VM_IMAGE_FORMAT, type VmImageManifest } from './sources.js';

export interface VmBuildOptions {
  /** Packages that are not to be downloaded. */
  readonly packages: Partial<Packages>;
  /** Where the parts go, in the place of what is there. */
  readonly directory: string;
  readonly say: (text: string) => void;
}

/** Beyond what the files need: tables of the file system. */
const FILE_SYSTEM_MIB = 8;

/**
 * Makes what a worker's VM consists of, from Debian's packages and the worker of this installation. Nothing is mounted,
 * and nothing needs root. @throws ToolstackError `missing-package` | `corrupt`
 */
export function buildVmImage({ packages, directory, say }: VmBuildOptions): VmImageManifest {
  if (process.arch !== 'x64') {
    throw new ToolstackError(
      'missing-package',
      'workers in a VM are for amd64 hosts; use --isolation sandbox',
    );
  }
  const guest = collectSources(bundledManifest('vm-guest.json'));
  const work = mkdtempSync(join(tmpdir(), 'vtpm-vm-'));
  try {
    say('getting the kernel and busybox from Debian');
    const debs = fetchPackages(packages, work);
    const kernel = unpack(debs.kernel, join(work, 'kernel'));
    const busybox = unpack(debs.busybox, join(work, 'busybox'));
    const made = privateDirectory(join(work, 'made'));
    copyFileSync(kernelIn(kernel), join(made, 'kernel'));
    say('making the initramfs');
    const initramfs = buildInitramfs({
      modules: join(kernel, 'lib/modules'),
      busybox: join(busybox, 'bin/busybox'),
      command: [guest.node, ...guest.argv],
      environment: guest.env,
    });
    writeFileSync(join(made, 'initramfs'), initramfs);
    say('making the root file system');
    buildRoot(guest, join(work, 'tree'), join(made, 'root'));
    const manifest: VmImageManifest = {
      format: VM_IMAGE_FORMAT,
      packages: [nameOf(debs.kernel), nameOf(debs.busybox)],
      guestDigest: installedDigest(guest),
    };
    writeFileSync(join(made, 'vm.json'), `${JSON.stringify(manifest, null, 2)}\n`);
    replaceDirectory(made, directory);
    return manifest;
  } finally {
    rmSync(work, { recursive: true, force: true });
  }
}

function kernelIn(tree: string): string {
  const name = readdirSync(join(tree, 'boot')).find((file) => file.startsWith('vmlinuz-'));
  if (name) return join(tree, 'boot', name);
  throw new ToolstackError(
    'corrupt',
    "the kernel package holds no kernel; use Debian's linux-image-cloud-amd64",
  );
}

/** An ext4 file system with the files of the worker, made without mounting it. */
function buildRoot({ files }: ImageSources, tree: string, path: string): void {
  for (const name of ['proc', '']) mkdirSync(join(tree, name), { recursive: true, mode: 0o755 });
  let bytes = 0;
  for (const { from, to, executable } of files) {
    const target = join(tree, to);
    mkdirSync(dirname(target), { recursive: true, mode: 0o755 });
    copyFileSync(from, target);
    chmodSync(target, executable ? 0o555 : 0o444);
    bytes += statSync(target).size;
  }
  const size = `${Math.ceil((bytes * 1.02) / 2 ** 20) + FILE_SYSTEM_MIB}M`;
  const options = ['-q', '-O', '^has_journal', '-m', '0', '-E', 'root_owner=0:0', '-d', tree, path, size];
  try {
    execFileSync('mkfs.ext4', options, {
      env: { PATH: `${process.env.PATH ?? ''}:/usr/sbin:/sbin` },
      stdio: ['ignore', 'ignore', 'pipe'],
      encoding: 'utf8',
    });
  } catch (cause) {
    const { code, stderr } = cause as NodeJS.ErrnoException & { stderr?: string };
    throw new ToolstackError(
      'missing-package',
      code === 'ENOENT'
        ? 'mkfs.ext4 is not installed; on Debian: apt-get install e2fsprogs'
        : `mkfs.ext4 failed: ${stderr?.trim() ?? (cause as Error).message}`,
      { cause },
    );
  }
}

/** Files first, then one rename: who reads at the same time sees the old parts or the new ones. */
function replaceDirectory(made: string, directory: string): void {
  const fresh = `${directory}.new`;
  const old = `${directory}.old`;
  for (const path of [fresh, old]) rmSync(path, { recursive: true, force: true });
  privateDirectory(fresh);
  for (const name of readdirSync(made)) copyFileSync(join(made, name), join(fresh, name));
  try {
    renameSync(directory, old);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'ENOENT') throw error;
  }
  renameSync(fresh, directory);
  rmSync(old, { recursive: true, force: true });
}
