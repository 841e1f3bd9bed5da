import { accessSync, constants } from 'node:fs';
import { delimiter, join } from 'node:path';
import { seccompFilter } from 'vtpm-common/seccomp/filter';
import { ToolstackError } from '../error.js';
import { LIMITS } from './limits.js';

/** In the templates: the root directory of the worker image. */
export const ROOT = '{root}';
/** In the templates: the private mount namespace that shows the images where every uid can read them. */
const VIEW = '{view}';
/** In the templates: the host uid and gid of this one worker. */
const UID = '{uid}';
/** In the templates: the descriptor from which bubblewrap reads the first filter. */
const FILTER = '{filter}';

/** Where the images are in their private mount namespace. */
export const VIEW_ROOT = '/mnt';

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

/**
 * Enters the groups that are named up to `--`, then executes the rest: every process of the worker is in them from its
 * first instruction on. The kernel makes who enters wait for some milliseconds; here nobody waits with it.
 */
const ENTER_GROUPS = [
  'while [ "$1" != -- ]; do echo 0 >"$1/cgroup.procs" || exit 125; shift; done',
  'shift; exec "$@"',
].join('; ');

/** Programs in front of bubblewrap, each of which executes the next, and what bubblewrap is told beyond its template. */
const LAYER_TEMPLATES = {
  groups: ['sh', '-c', ENTER_GROUPS, 'sh'],
  /** A uid that may not enter the image's directory reads the image here. */
  view: ['nsenter', `--mount=${VIEW}`, '--'],
  limits: ['prlimit', ...LIMITS.resources.map(({ option, value }) => `--${option}=${value}`)],
  ownUidLimits: [`--${LIMITS.ownUidProcesses.option}=${LIMITS.ownUidProcesses.value}`],
  uid: [
    ...['setpriv', '--reuid', UID, '--regid', UID, '--clear-groups'],
    ...['--bounding-set=-all', '--inh-caps=-all', '--no-new-privs', '--'],
  ],
  filter: ['--seccomp', FILTER],
} as const;

/** Of a worker that takes no second filter, because it is not confined or that layer was waived. */
const UNFILTERED = '--no-seccomp';

/** Everything that decides how a worker is started and with what filter. Part of the image's digest. */
export function launchMeasure(): string {
  const filters = (['start', 'serve'] as const).map((stage) => seccompFilter(stage).toString('hex'));
  return JSON.stringify([SANDBOX_TEMPLATE, LAYER_TEMPLATES, UNFILTERED, LIMITS, filters]);
}

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
  /** Descriptors of the caller that the program gets, from number FIRST_DESCRIPTOR on. */
  readonly descriptors: readonly number[];
}

/** Below it are the standard ones and the worker's three channels. */
export const FIRST_DESCRIPTOR = 6;

/** What one worker is given beyond bubblewrap's own layers. What is absent is not asked for. */
export interface SandboxLayers {
  /** `view`: path of the mount namespace in which the image is at `root`. */
  readonly own?: { readonly uid: number; readonly view: string; readonly root: string };
  readonly limits: boolean;
  /** Paths of cgroups. */
  readonly groups: readonly string[];
  /** A descriptor that reads the first filter from its beginning. bubblewrap closes it. */
  readonly filter?: number;
  /** The worker installs the second filter. */
  readonly filtersItself: boolean;
}

/** @throws ToolstackError `missing-package` */
export function sandboxCommand(
  image: ImageCommand,
  { own, limits, groups, filter, filtersItself }: SandboxLayers,
  path = process.env.PATH ?? '',
): Command {
  const values: Record<string, string> = {
    [ROOT]: own?.root ?? image.root,
    [VIEW]: own?.view ?? '',
    [UID]: String(own?.uid),
    [FILTER]: String(FIRST_DESCRIPTOR),
  };
  const fill = (template: readonly string[]): string[] =>
    template.map((argument) =>
      argument.replace(/^(--mount=)?(\{\w+\})$/, (_, option = '', name) => `${option}${values[name]}`),
    );
  const programs = [
    groups.length > 0 ? [...LAYER_TEMPLATES.groups, ...groups, '--'] : [],
    own ? LAYER_TEMPLATES.view : [],
    limits ? [...LAYER_TEMPLATES.limits, ...(own ? LAYER_TEMPLATES.ownUidLimits : []), '--'] : [],
    own ? LAYER_TEMPLATES.uid : [],
    ['bwrap', ...SANDBOX_TEMPLATE, ...(filter === undefined ? [] : LAYER_TEMPLATES.filter)],
  ].filter((program) => program.length > 0);
  const [file = '', ...args] = programs.flatMap((program) => {
    const [name = '', ...rest] = fill(program);
    return [findProgram(name, path), ...rest];
  });
  return {
    file,
    args: [
      ...args,
      ...Object.entries(image.env).flatMap(([name, value]) => ['--setenv', name, value]),
      '--',
      ...[image.node, ...image.argv, ...(filtersItself ? [] : [UNFILTERED])],
    ],
    env: {},
    descriptors: filter === undefined ? [] : [filter],
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
    args: [
      ...['--library-path', inImage(image.libraries), inImage(image.node)],
      ...[...image.argv.map(inImage), UNFILTERED],
    ],
    descriptors: [],
    env: Object.fromEntries(Object.entries(image.env).map(([name, value]) => [name, inImage(value)])),
  };
}

const PACKAGES: Readonly<Record<string, string>> = {
  bwrap: 'bubblewrap',
};

/** The absolute path of a program that confines workers. @throws ToolstackError `missing-package` */
export function findProgram(name: string, path = process.env.PATH ?? ''): string {
  for (const directory of [...path.split(delimiter), '/usr/bin', '/usr/local/bin']) {
    const file = join(directory, name);
    try {
      if (!directory.startsWith('/')) continue;
      accessSync(file, constants.X_OK);
      return file;
    } catch {
      // The next directory.
    }
  }
  const owner = PACKAGES[name] ?? 'util-linux';
  throw new ToolstackError(
    'missing-package',
    `${owner} (${name}) is not installed and workers are confined by it; on Debian: apt-get install ${owner}`,
  );
}
