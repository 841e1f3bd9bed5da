import { execFileSync } from 'node:child_process';
import { cpSync, mkdirSync, readdirSync, readFileSync, statSync, writeFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { type ArchiveEntry, cpioArchive } from 'vtpm-toolstack/vm/cpio';
import { unpack } from 'vtpm-toolstack/vm/debian';
import { debianPackage } from './vm-image.js';

/** What tpm2-tools loads by name. */
const PLUGINS = ['libtss2-tcti-device.so.0', 'libtss2-tctildr.so.0'].map(
  (name) => `/usr/lib/x86_64-linux-gnu/${name}`,
);

export interface Bootable {
  readonly kernel: string;
  readonly initramfs: string;
}

/** A small Linux: Debian's kernel for clouds, busybox, the given programs with their libraries, and what `fill` adds. */
export function bootable(
  directory: string,
  init: (kernelFiles: string) => string,
  programs: readonly string[],
  fill: (tree: string, kernelFiles: string) => void,
): Bootable {
  const kernel = unpack(debianPackage('linux-image-'), join(directory, 'kernel'));
  const busybox = unpack(debianPackage('busybox-static'), join(directory, 'busybox'));
  const tree = join(directory, 'tree');
  for (const name of ['dev', 'proc', 'sys', 'tmp']) mkdirSync(join(tree, name), { recursive: true });
  writeFileSync(join(tree, 'init'), init(kernel), { mode: 0o755 });
  copy(join(busybox, 'bin/busybox'), join(tree, 'busybox'));
  for (const file of needed([...programs, ...PLUGINS])) copy(file, join(tree, file));
  fill(tree, kernel);
  const initramfs = join(directory, 'initramfs');
  writeFileSync(initramfs, cpioArchive(entriesOf(tree)));
  const boot = readdirSync(join(kernel, 'boot')).find((name) => name.startsWith('vmlinuz-'));
  if (!boot) throw new Error('the kernel package has no kernel');
  return { kernel: join(kernel, 'boot', boot), initramfs };
}

/** Programs, and all that the loader wants for them and for what they load by name. */
function needed(programs: readonly string[]): string[] {
  const said = execFileSync('ldd', [...programs], { encoding: 'utf8' });
  const libraries = [...said.matchAll(/(\/[^\s:]+)(?= \()/g)].map(([path]) => path);
  return [...new Set([...programs, ...libraries])];
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
      const stat = statSync(path);
      if (stat.isDirectory()) return { name };
      return { name, content: readFileSync(path), executable: (stat.mode & 0o111) !== 0 };
    });
}
