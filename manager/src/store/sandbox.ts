import { execFileSync } from 'node:child_process';
import { existsSync, readFileSync } from 'node:fs';
import { dirname, isAbsolute, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { ManagerError } from '../error.js';

/**
 * The command line that runs this Node on `script` in bubblewrap with nothing but itself, its libraries, the files of
 * the store process (all read-only) and `directory` (writable): no network, no capability, an empty environment, its
 * own pid, ipc, uts, user and mount namespaces. It dies with the manager.
 */
export function sandboxCommand(script: string, args: readonly string[], directory: string): string[] {
  const readable = [process.execPath, ...sharedObjects(process.execPath), ...scriptFiles(script)];
  return [
    'bwrap',
    ...['--unshare-all', '--unshare-user', '--disable-userns', '--cap-drop', 'ALL'],
    ...['--new-session', '--die-with-parent', '--clearenv'],
    ...environment().flatMap(([name, value]) => ['--setenv', name, value]),
    ...readable.flatMap((path) => ['--ro-bind', path, path]),
    ...['--proc', '/proc', '--dev', '/dev'],
    ...['--bind', directory, directory],
    // A process of the host's root may write to /proc/sys without any capability (sysctl_perm in the kernel), and with
    // /proc/sys/kernel/core_pattern it would be out.
    ...['/proc', '/dev', '/'].flatMap((path) => ['--remount-ro', path]),
    ...['--chdir', '/', '--'],
    ...[process.execPath, script, ...args],
  ];
}

/** What the store process needs of an environment, with and without a sandbox. */
export function environment(): [string, string][] {
  // lmdb's encoder would load a second native addon, for an encoding that is not used.
  return [['MSGPACKR_NATIVE_ACCELERATION_DISABLED', 'true']];
}

/** The libraries of a program and its interpreter, as the loader itself lists them (ld.so(8)). */
function sharedObjects(program: string): string[] {
  const listing = execFileSync(program, ['--version'], {
    encoding: 'utf8',
    env: { LD_TRACE_LOADED_OBJECTS: '1' },
  });
  return [...listing.matchAll(/(?:=> )?(\/\S+) \(0x/g)].map((match) => String(match[1]));
}

/** The script's own folder, the package.json that makes it a module, and the packages under it. */
function scriptFiles(script: string): string[] {
  const directory = dirname(script);
  const manifest = nearestManifest(directory);
  return [directory, manifest, ...packagesOf('lmdb', directory)];
}

function nearestManifest(directory: string): string {
  for (let at = directory; ; at = dirname(at)) {
    const path = join(at, 'package.json');
    if (existsSync(path)) return path;
    if (at === dirname(at)) throw new ManagerError('internal', `no package.json above ${directory}`);
  }
}

/** The folders of a package and of all that it depends on, found as Node finds them. */
function packagesOf(name: string, from: string, found = new Set<string>()): Set<string> {
  for (let at = from; ; at = dirname(at)) {
    const folder = join(at, 'node_modules', name);
    if (existsSync(folder)) {
      if (found.has(folder)) return found;
      found.add(folder);
      const manifest = JSON.parse(readFileSync(join(folder, 'package.json'), 'utf8')) as Manifest;
      const needed = { ...manifest.dependencies, ...manifest.optionalDependencies };
      for (const next of Object.keys(needed)) packagesOf(next, folder, found);
      return found;
    }
    // Optional packages of other platforms are absent.
    if (at === dirname(at)) return found;
  }
}

interface Manifest {
  readonly dependencies?: Record<string, string>;
  readonly optionalDependencies?: Record<string, string>;
}

/** Where the program of the store process is. */
export function childScript(): string {
  const path = fileURLToPath(new URL('./child-main.js', import.meta.url));
  if (!isAbsolute(path) || !existsSync(path)) {
    throw new ManagerError('internal', `${path} is missing: build the manager again`);
  }
  return path;
}
