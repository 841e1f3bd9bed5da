import { existsSync, readdirSync, rmdirSync, rmSync } from 'node:fs';
import { join, resolve } from 'node:path';
import { createInterface } from 'node:readline/promises';
import { lockFile, type Paths } from 'vtpm-common';
import { ToolstackError } from '../../error.js';
import { VtpmList } from '../../supervisor/vtpm-list.js';
import { holdBackgroundLock, runningDaemon } from '../background.js';
import type { Context } from '../context.js';
import type { Daemon } from '../http.js';
import { runManagerCommand } from '../manager-command.js';

export interface UninstallFlags {
  readonly evict?: boolean;
  readonly force?: boolean;
  readonly ownerAuthFile?: string;
  readonly yes?: boolean;
}

interface Removal {
  readonly removed: readonly string[];
  readonly left: readonly string[];
}

/**
 * Removes what init and the daemons made, in the TPM and on disk. The manager's part comes first: until it is done this
 * can be repeated with everything at hand, and afterwards what is left is files.
 */
export async function uninstall(flags: UninstallFlags, context: Context): Promise<void> {
  const { configuration, output } = context;
  const { paths } = configuration;
  const parts = [paths.manager.directory, paths.toolstack.directory, paths.supervisor.directory];
  if (!parts.some(existsSync)) {
    throw new ToolstackError(
      'not-initialised',
      `there is no installation in ${paths.home}; name another with --home`,
    );
  }
  if (existsSync(paths.run)) holdBackgroundLock(paths);
  await refuseWhileRunning(context);
  const names = VtpmList.open(paths.supervisor.vtpms)?.all() ?? [];
  if (names.length > 0) {
    throw new ToolstackError(
      'vtpms-exist',
      `there ${names.length === 1 ? 'is a vTPM' : `are ${names.length} vTPMs`}: ${names.map(({ name }) => name).join(', ')}. ` +
        'Start the daemons with vtpmctl up, delete each with vtpmctl delete NAME, then vtpmctl down and uninstall',
    );
  }
  await confirm(paths.home, flags.yes === true);
  const { removed, left } = existsSync(paths.manager.directory)
    ? await runManagerCommand<Removal>(paths, managerArguments(flags))
    : { removed: [], left: [] };
  const files = removeFiles(paths);
  const all = { removed: [...removed, ...files.removed], left: [...left, ...files.left] };
  output.result(
    { home: paths.home, ...all },
    [...all.removed.map((what) => `removed  ${what}`), ...all.left.map((what) => `left     ${what}`)].join(
      '\n',
    ),
  );
}

function managerArguments({ evict, force, ownerAuthFile }: UninstallFlags): string[] {
  return [
    'uninstall',
    ...(evict === true ? ['--evict'] : []),
    ...(force === true ? ['--force'] : []),
    ...(ownerAuthFile === undefined ? [] : ['--owner-auth-file', resolve(ownerAuthFile)]),
  ];
}

/** Also one that a service manager started, and one that does not answer. */
async function refuseWhileRunning({ configuration, manager, supervisor }: Context): Promise<void> {
  const { paths } = configuration;
  const running = (daemon: Daemon) =>
    new ToolstackError(
      'in-use',
      `the ${daemon} runs; stop it first: vtpmctl down (or what started it, for example systemctl)`,
    );
  for (const [daemon, health, lock] of [
    ['supervisor', () => supervisor.health(2_000), paths.supervisor.lock],
    ['manager', () => manager.health(2_000), paths.manager.lock],
  ] as const) {
    const isAnswering = await health().then(
      () => true,
      () => false,
    );
    if (isAnswering || runningDaemon(paths, daemon)) throw running(daemon);
    // The manager takes its own lock itself; looking at it must not leave a file behind.
    if (daemon === 'supervisor' && existsSync(lock) && lockFile(lock) === undefined) throw running(daemon);
  }
}

async function confirm(home: string, isConfirmed: boolean): Promise<void> {
  if (isConfirmed) return;
  if (!process.stdin.isTTY || !process.stderr.isTTY) {
    throw new ToolstackError(
      'usage',
      `uninstalling removes the keys of ${home} for good, on disk and in the TPM; to do it without a question add --yes`,
    );
  }
  const ask = createInterface({ input: process.stdin, output: process.stderr });
  try {
    const answer = await ask.question(
      `Remove the installation in ${home} with its keys, for good? Type "remove": `,
    );
    if (answer.trim() !== 'remove') throw new ToolstackError('usage', 'nothing was removed');
  } finally {
    ask.close();
  }
}

/** Only what this software makes, by name. What somebody else put there stays, and so does the directory around it. */
function removeFiles(paths: Paths): { removed: string[]; left: string[] } {
  const removed: string[] = [];
  const remove = (path: string, what: string): void => {
    if (!existsSync(path)) return;
    rmSync(path, { recursive: true, force: true });
    removed.push(`${what}, ${path}`);
  };
  const sweep = (directory: string, pattern: RegExp): boolean => {
    const found = existsSync(directory) ? readdirSync(directory).filter((name) => pattern.test(name)) : [];
    for (const name of found) rmSync(join(directory, name), { recursive: true, force: true });
    return found.length > 0;
  };
  remove(paths.supervisor.vtpms, 'the list of vTPMs');
  remove(paths.supervisor.delegateKey, "the supervisor's key");
  remove(paths.supervisor.images, 'the worker images');
  remove(paths.supervisor.vm, 'the image for workers in VMs');
  sweep(
    paths.supervisor.directory,
    /^(workers\.json|lock|vtpms\.journal-[0-9a-f]+|(vtpms\.json|delegate\.key|workers\.json)\.new)$/,
  );
  remove(paths.toolstack.managerIdentity, "the manager's identity");
  remove(paths.toolstack.key, 'the toolstack key');
  sweep(paths.toolstack.directory, /^(manager\.json|toolstack\.key)\.new$/);
  if (sweep(paths.log, /^(manager|supervisor|vtpm-[a-z0-9._-]+)\.log(\.1)?$/))
    removed.push(`logs in ${paths.log}`);
  const { doors, socket } = paths.supervisor;
  for (const path of Object.values(paths.manager)) if (path.endsWith('.sock')) rmSync(path, { force: true });
  rmSync(socket, { force: true });
  if (
    sweep(paths.run, /^((manager|supervisor)\.pid(\.new)?|background\.lock|supervisor\.sock\.lock|vtpms)$/)
  ) {
    removed.push(`what was in ${paths.run}`);
  }
  const left: string[] = [];
  const runManager = join(paths.run, 'manager');
  const { manager, toolstack, supervisor } = paths;
  const own = [
    doors,
    runManager,
    paths.run,
    manager.directory,
    toolstack.directory,
    supervisor.directory,
    paths.log,
  ];
  for (const directory of [...own, paths.home]) {
    if (!existsSync(directory)) continue;
    try {
      rmdirSync(directory);
      if (directory === paths.home) removed.push(`the directory ${directory}`);
    } catch {
      left.push(...readdirSync(directory).map((name) => join(directory, name)));
    }
  }
  // A directory stands for what is in it.
  return { removed, left: left.filter((path) => !left.some((other) => other.startsWith(`${path}/`))) };
}
