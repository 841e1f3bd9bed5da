import { accessSync, constants } from 'node:fs';
import { delimiter, join } from 'node:path';
import { ToolstackError } from '../error.js';

/** In the argument template: the root directory of the worker image. */
export const ROOT = '{root}';

/** The uid and gid that the worker sees as its own. */
const WORKER_ID = '4242';

/**
 * bubblewrap's arguments up to the command; part of the worker image's digest. What is left of the host: the image,
 * read-only, as the root; a /proc of the worker's own processes; /dev with null, zero, full, random, urandom, tty.
 */
export const SANDBOX_TEMPLATE: readonly string[] = [
  '--unshare-all',
  '--unshare-user',
  '--disable-userns',
  ...['--uid', WORKER_ID, '--gid', WORKER_ID],
  ...['--cap-drop', 'ALL'],
  '--new-session',
  '--die-with-parent',
  '--clearenv',
  ...['--hostname', 'vtpm'],
  ...['--ro-bind', ROOT, '/'],
  ...['--proc', '/proc'],
  // Where the supervisor is root, uid 4242 is the host's uid 0 to the kernel, and /proc/sys judges by that one:
  // a writable /proc would let the worker set core_pattern.
  ...['--remount-ro', '/proc'],
  ...['--dev', '/dev'],
  ...['--remount-ro', '/dev'],
  ...['--chdir', '/'],
];

export interface ImageCommand {
  /** Of the copy, on the host. */
  readonly root: string;
  /** Of node inside the image. */
  readonly node: string;
  /** Of the dynamic loader inside the image. */
  readonly loader: string;
  /** Directory inside the image with every shared library. */
  readonly libraries: string;
  /** node's arguments; absolute paths are inside the image. */
  readonly argv: readonly string[];
  readonly env: Readonly<Record<string, string>>;
}

export interface Command {
  readonly file: string;
  readonly args: readonly string[];
  readonly env: Readonly<Record<string, string>>;
}

/** @throws ToolstackError `missing-package` */
export function sandboxCommand(image: ImageCommand, path = process.env.PATH ?? ''): Command {
  const environment = Object.entries(image.env).flatMap(([name, value]) => ['--setenv', name, value]);
  const template = SANDBOX_TEMPLATE.map((argument) => (argument === ROOT ? image.root : argument));
  return {
    file: findBubblewrap(path),
    args: [...template, ...environment, '--', image.node, ...image.argv],
    env: {},
  };
}

/**
 * Runs the same copy without confinement. The image's loader is named so that none of the host's libraries
 * takes the place of a measured one.
 */
export function bareCommand(image: ImageCommand): Command {
  const inImage = (value: string): string => (value.startsWith('/') ? join(image.root, value) : value);
  return {
    file: inImage(image.loader),
    args: ['--library-path', inImage(image.libraries), inImage(image.node), ...image.argv.map(inImage)],
    env: Object.fromEntries(Object.entries(image.env).map(([name, value]) => [name, inImage(value)])),
  };
}

/** @throws ToolstackError `missing-package` */
export function findBubblewrap(path: string): string {
  for (const directory of [...path.split(delimiter), '/usr/bin', '/usr/local/bin']) {
    const file = join(directory, 'bwrap');
    try {
      if (!directory.startsWith('/')) continue;
      accessSync(file, constants.X_OK);
      return file;
    } catch {
      // The next directory.
    }
  }
  throw new ToolstackError(
    'missing-package',
    'bubblewrap (bwrap) is not installed and workers are confined by it; on Debian: apt-get install bubblewrap',
  );
}
