import { execFileSync } from 'node:child_process';
import { mkdirSync, readdirSync } from 'node:fs';
import { join } from 'node:path';
import { ToolstackError } from '../error.js';

/** Debian packages that a VM image is made of, as files. */
export interface Packages {
  readonly kernel: string;
  readonly busybox: string;
}

/** Depends on the newest kernel that has only what a virtual machine needs. */
const KERNEL = 'linux-image-cloud-amd64';
const BUSYBOX = 'busybox-static';

/** Downloads what is not given, from where apt gets its packages. @throws ToolstackError `missing-package` */
export function fetchPackages(given: Partial<Packages>, directory: string): Packages {
  return {
    kernel: given.kernel ?? download(kernelPackage(), directory),
    busybox: given.busybox ?? download(BUSYBOX, directory),
  };
}

/** Unpacks without installing. @returns the directory */
export function unpack(deb: string, directory: string): string {
  mkdirSync(directory, { recursive: true });
  run('dpkg-deb', ['-x', deb, directory]);
  return directory;
}

/** `package version` */
export function nameOf(deb: string): string {
  return ['Package', 'Version'].map((field) => run('dpkg-deb', ['-f', deb, field]).trim()).join(' ');
}

function kernelPackage(): string {
  const found = /Depends: (linux-image-\d\S*)/.exec(run('apt-cache', ['depends', KERNEL]))?.[1];
  if (found) return found;
  throw new ToolstackError('missing-package', `apt knows no kernel behind ${KERNEL}; ${HINT}`);
}

function download(name: string, directory: string): string {
  const place = join(directory, name);
  mkdirSync(place, { recursive: true });
  run('apt-get', ['download', '-q', name], place);
  const file = readdirSync(place).find((candidate) => candidate.endsWith('.deb'));
  if (file) return join(place, file);
  throw new ToolstackError('missing-package', `apt-get download ${name} brought nothing; ${HINT}`);
}

const HINT =
  'run apt-get update, or give the files: --kernel-deb FILE --busybox-deb FILE (linux-image-…-cloud-amd64, busybox-static)';

function run(program: string, args: string[], cwd?: string): string {
  try {
    return execFileSync(program, args, { cwd, encoding: 'utf8', stdio: ['ignore', 'pipe', 'pipe'] });
  } catch (cause) {
    const { code, stderr } = cause as NodeJS.ErrnoException & { stderr?: string };
    const reason = code === 'ENOENT' ? 'it is not installed' : lastLine(stderr) || (cause as Error).message;
    throw new ToolstackError('missing-package', `${program} ${args.join(' ')}: ${reason}; ${HINT}`, {
      cause,
    });
  }
}

function lastLine(text = ''): string {
  return text.trim().split('\n').at(-1) ?? '';
}
