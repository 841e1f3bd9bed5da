import { existsSync, readdirSync, readFileSync, statSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { type Finding, finding, type Paths, shortageText, spaceShortage } from 'vtpm-common';
import { VtpmList } from '../../supervisor/vtpm-list.js';
import { runningDaemon } from '../background.js';

/** Who may read what under the home and run directories. */
export function checkFiles(paths: Paths): Finding[] {
  const { manager, toolstack, supervisor } = paths;
  // Others pass through it at most, where the operator keeps the run directory below it; and the manager's user, where it
  // has one of its own.
  const outer = 0o700 | (doorsAreShared(paths) ? 0o011 : 0) | (managerHasUser(paths) ? 0o050 : 0);
  const findings = [
    directory('home-mode', paths.home, outer, 'warning'),
    ...[
      manager.directory,
      manager.store,
      manager.softtpm,
      toolstack.directory,
      supervisor.directory,
      paths.log,
    ].map((path) => directory('home-mode', path, 0o700, 'problem')),
    // Workers with uids of their own pass through it, in a view in which nothing is above it.
    directory('home-mode', supervisor.images, 0o711, 'problem'),
    ...[toolstack.key, supervisor.delegateKey].map((path) => file('key-mode', path, 'problem')),
    ...[manager.enrolment, supervisor.vtpms, toolstack.managerIdentity].map((path) =>
      file('file-mode', path, 'warning'),
    ),
    directory('run-mode', paths.run, outer, 'warning'),
    directory('run-mode', dirname(manager.adminSocket), 0o700, 'problem'),
    ...[manager.adminSocket, manager.workerSocket, manager.toolstackSocket, supervisor.socket].map((path) =>
      file('socket-mode', path, 'problem'),
    ),
  ].filter((found) => found !== undefined);
  if (findings.length > 0) return findings;
  if (!existsSync(paths.home)) return [];
  return [finding('file-modes', 'ok', 'home, sockets and keys are readable by their owner only')];
}

function directory(
  check: string,
  path: string,
  most: number,
  level: 'warning' | 'problem',
): Finding | undefined {
  return look(check, path, most, level);
}

function file(check: string, path: string, level: 'warning' | 'problem'): Finding | undefined {
  return look(check, path, 0o600, level);
}

/** @param most the widest mode it may have */
function look(check: string, path: string, most: number, level: 'warning' | 'problem'): Finding | undefined {
  const stat = statSync(path, { throwIfNoEntry: false });
  if (!stat) return undefined;
  const self = process.getuid?.();
  const mode = stat.mode & 0o777;
  if (stat.uid !== self && self !== 0) {
    return finding(
      check,
      level,
      `${path} belongs to user ${stat.uid}, not to you (${self})`,
      `sudo chown ${self} ${path}`,
    );
  }
  if ((mode & ~most & 0o077) === 0) return undefined;
  return finding(
    check,
    level,
    `others may get at ${path} (mode 0${mode.toString(8)})`,
    `chmod 0${most.toString(8)} ${path}`,
  );
}

/** Whether the manager runs as another user than the supervisor, in the group that home belongs to. */
function managerHasUser({ home, manager }: Paths): boolean {
  const own = statSync(manager.directory, { throwIfNoEntry: false });
  const outer = statSync(home, { throwIfNoEntry: false });
  return own !== undefined && outer !== undefined && own.uid !== outer.uid && own.gid === outer.gid;
}

/** Whether some vTPM's sockets belong to another user: then others pass through the run directory. */
function doorsAreShared({ supervisor }: Paths): boolean {
  try {
    return (
      VtpmList.open(supervisor.vtpms)
        ?.all()
        .some(({ socketOwner }) => socketOwner !== null) ?? false
    );
  } catch {
    return false;
  }
}

/** Of the daemons that `up` started: what they make is for their owner alone. */
export function checkUmask(paths: Paths): Finding[] {
  return (['manager', 'supervisor'] as const).flatMap((daemon) => {
    const running = runningDaemon(paths, daemon);
    if (!running) return [];
    const umask = /^Umask:\s*(\d+)$/m.exec(readFileSync(`/proc/${running.pid}/status`, 'latin1'))?.[1];
    return umask === undefined || (Number.parseInt(umask, 8) & 0o077) === 0o077
      ? [finding('umask', 'ok', `the ${daemon} makes files for its owner only`)]
      : [
          finding(
            'umask',
            'problem',
            `the ${daemon} runs with umask ${umask}`,
            'vtpmctl down, then vtpmctl up',
          ),
        ];
  });
}

/** @param reserveMiB of the setting store-reserve */
export function checkDisk(paths: Paths, reserveMiB: number): Finding {
  let at = existsSync(paths.manager.store) ? paths.manager.store : paths.home;
  while (!existsSync(at)) at = dirname(at);
  const shortage = spaceShortage(at, reserveMiB);
  const largest = `du -xh --max-depth=1 ${at} shows what takes room`;
  if (shortage) return finding('disk', 'problem', `no new vTPM is made: ${shortageText(shortage)}`, largest);
  if (spaceShortage(at, 4 * reserveMiB)) {
    return finding(
      'disk',
      'warning',
      `the disk of ${at} comes near the reserve of ${reserveMiB} MiB`,
      largest,
    );
  }
  return finding('disk', 'ok', `the disk of ${at} has more than its reserve of ${reserveMiB} MiB free`);
}

/** Left by programs of another version, or put there by hand. */
export function checkLeftovers(paths: Paths): Finding[] {
  const images = existsSync(paths.supervisor.images) ? readdirSync(paths.supervisor.images) : [];
  return images
    .filter((name) => name.startsWith('building-'))
    .map((name) =>
      finding(
        'leftovers',
        'note',
        `${join(paths.supervisor.images, name)} is of a supervisor that was interrupted`,
        'vtpmctl down, then vtpmctl up',
      ),
    );
}
