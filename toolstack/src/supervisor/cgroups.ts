import {
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  rmdirSync,
  writeFileSync,
} from 'node:fs';
import { basename, dirname, join, relative } from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { readKernelFile } from './kernel-file.js';
import { LIMITS } from './limits.js';

export const CONTROLLERS = ['memory', 'pids', 'cpu'] as const;
export type Controller = (typeof CONTROLLERS)[number];

/** Where a controller's groups are: its mount, and the supervisor's own group in it. */
export interface Hierarchy {
  readonly version: 1 | 2;
  readonly mount: string;
  /** Absolute. */
  readonly own: string;
}

/** What the files of a group must hold (kernel documentation, cgroup-v1 and cgroup-v2). The first is what is asked for later. */
const { memoryBytes, processes, cpuQuota, cpuPeriod } = LIMITS.cgroup;
const FILES: Readonly<Record<1 | 2, Readonly<Record<Controller, readonly (readonly [string, string])[]>>>> = {
  1: {
    memory: [['memory.limit_in_bytes', String(memoryBytes)]],
    pids: [['pids.max', String(processes)]],
    cpu: [
      ['cpu.cfs_quota_us', String(cpuQuota)],
      ['cpu.cfs_period_us', String(cpuPeriod)],
    ],
  },
  2: {
    memory: [['memory.max', String(memoryBytes)]],
    pids: [['pids.max', String(processes)]],
    cpu: [['cpu.max', `${cpuQuota} ${cpuPeriod}`]],
  },
};

/** Of one worker. */
export interface WorkerGroup {
  /** Absolute. A process enters by writing 0 to the file `cgroup.procs` of each. */
  readonly paths: readonly string[];
  /** Resolves when it is gone, which is when nothing is in it any more. */
  remove(): Promise<void>;
}

const REMOVE_ATTEMPTS = 100;
const REMOVE_PAUSE_MS = 20;

/**
 * Of the groups of a supervisor, with its process id and the namespace in which it is that: those of a dead one are
 * anybody's to remove who can see that it is dead. In another namespace, a container's for example, nobody else can.
 */
const NAME = /^vtpm-(\d+)-(\d+)-\d+$/;

/**
 * One group of the kernel for each worker, below the one that the supervisor runs in: the limits of whoever started the
 * supervisor hold for its workers too.
 */
export class WorkerGroups {
  /** Why there is no group for a controller. */
  readonly missing: ReadonlyMap<Controller, string>;
  readonly #parents: ReadonlyMap<string, readonly (readonly [Controller, 1 | 2])[]>;
  #count: number;

  /**
   * Removes what dead supervisors left. Never throws: what cannot be had is in `missing`.
   * @param made groups that this process made already, as the program that it was before
   */
  static open(made = 0, found = findHierarchies()): WorkerGroups {
    const missing = new Map<Controller, string>();
    const parents = new Map<string, (readonly [Controller, 1 | 2])[]>();
    for (const controller of CONTROLLERS) {
      const hierarchy = found.get(controller);
      if (!hierarchy) {
        missing.set(controller, `there is no cgroup controller "${controller}" here`);
        continue;
      }
      try {
        const parent = parentOf(hierarchy, controller);
        removeLeft(parent, made > 0);
        tryOut(parent, controller, hierarchy.version);
        parents.set(parent, [...(parents.get(parent) ?? []), [controller, hierarchy.version]]);
      } catch (error) {
        missing.set(controller, (error as Error).message);
      }
    }
    return new WorkerGroups(parents, missing, made);
  }

  private constructor(
    parents: ReadonlyMap<string, readonly (readonly [Controller, 1 | 2])[]>,
    missing: ReadonlyMap<Controller, string>,
    made: number,
  ) {
    this.#count = made;
    this.#parents = parents;
    this.missing = missing;
  }

  get made(): number {
    return this.#count;
  }

  /** With its limits set. @throws an error of the file system */
  create(wanted: readonly Controller[]): WorkerGroup {
    const name = nameOf(++this.#count);
    const made: string[] = [];
    const remove = async (): Promise<void> => {
      for (const path of made) await removeGroup(path);
    };
    try {
      for (const [parent, controllers] of this.#parents) {
        const path = join(parent, name);
        mkdirSync(path, { mode: 0o755 });
        made.push(path);
        for (const [controller, version] of controllers) {
          if (wanted.includes(controller)) setLimits(path, controller, version);
        }
      }
    } catch (error) {
      void remove();
      throw error;
    }
    return { paths: made, remove };
  }
}

/** What the kernel says of a process: the controllers whose limit is set in the group that it is in. */
export function limitedBy(pid: number): Controller[] {
  hierarchies ??= findHierarchies();
  const known = hierarchies;
  const groups = groupsOf(pid);
  return CONTROLLERS.filter((controller) => {
    const hierarchy = known.get(controller);
    const path = hierarchy && groups.get(hierarchy.version === 2 ? '' : controller);
    if (!hierarchy || path === undefined) return false;
    const [file, value] = FILES[hierarchy.version][controller][0] ?? [];
    try {
      return readFileSync(join(hierarchy.mount, path, file ?? ''), 'utf8').trim() === value;
    } catch {
      return false;
    }
  });
}

/** Asked for each worker that is shown: mounts stay. */
let hierarchies: ReadonlyMap<Controller, Hierarchy> | undefined;

/** By /proc/self/mountinfo and /proc/self/cgroup. A controller is in one hierarchy: that of version 1 it is bound to, or version 2's. */
export function findHierarchies(
  mountinfo = readKernelFile('/proc/self/mountinfo'),
  own = groupsOf('self'),
): ReadonlyMap<Controller, Hierarchy> {
  const found = new Map<Controller, Hierarchy>();
  for (const line of mountinfo.split('\n')) {
    const [left = '', right = ''] = line.split(' - ');
    const [, , , root = '/', mount = ''] = left.split(' ');
    const [type, , options = ''] = right.split(' ');
    if (type !== 'cgroup' && type !== 'cgroup2') continue;
    const version = type === 'cgroup' ? 1 : 2;
    const names =
      version === 1
        ? options.split(',')
        : readKernelFile(join(mount, 'cgroup.controllers')).trim().split(' ');
    for (const controller of CONTROLLERS) {
      const group = own.get(version === 2 ? '' : controller);
      if (!names.includes(controller) || group === undefined || found.has(controller)) continue;
      // Of a container the mount shows a part, and the paths may be of the whole.
      const inside = relative(root, group);
      if (inside.startsWith('..')) continue;
      found.set(controller, { version, mount, own: join(mount, inside) });
    }
  }
  return found;
}

/** proc(5), /proc/pid/cgroup: the path in each hierarchy by controller; version 2's by ''. */
function groupsOf(pid: number | 'self'): Map<string, string> {
  const groups = new Map<string, string>();
  for (const line of readKernelFile(`/proc/${pid}/cgroup`).split('\n')) {
    const [, names, ...path] = line.split(':');
    if (names === undefined) continue;
    for (const name of names.split(',')) groups.set(name, path.join(':'));
  }
  return groups;
}

/**
 * In version 2 a group with processes in it gives its children no controllers, the outermost one excepted. Where only
 * this process is in it, as in a service with a delegated group, it moves aside; else the next group outwards without
 * processes is taken, as under a login session.
 */
function parentOf({ version, mount, own }: Hierarchy, controller: Controller): string {
  if (version === 1) return own;
  // It moved aside before.
  let at = basename(own) === ASIDE ? dirname(own) : own;
  if (at === own && at !== mount && isAlone(at)) {
    mkdirSync(join(at, ASIDE), { recursive: true, mode: 0o755 });
    writeFileSync(join(at, ASIDE, 'cgroup.procs'), String(process.pid));
  }
  while (at !== mount && readKernelFile(join(at, 'cgroup.procs')) !== '') at = dirname(at);
  // Each group on the way hands it on to the next.
  const way = [at];
  for (let outer = at; outer !== mount; ) {
    outer = dirname(outer);
    way.unshift(outer);
  }
  for (const group of way) {
    const file = join(group, 'cgroup.subtree_control');
    if (!readKernelFile(file).split(/\s/).includes(controller)) writeFileSync(file, `+${controller}`);
  }
  return at;
}

const ASIDE = 'vtpm-supervisor';

function isAlone(group: string): boolean {
  return readKernelFile(join(group, 'cgroup.procs')).trim() === String(process.pid);
}

function tryOut(parent: string, controller: Controller, version: 1 | 2): void {
  const path = join(parent, nameOf(0));
  mkdirSync(path, { mode: 0o755 });
  try {
    setLimits(path, controller, version);
  } finally {
    rmdirSync(path);
  }
}

function setLimits(path: string, controller: Controller, version: 1 | 2): void {
  for (const [file, value] of FILES[version][controller]) writeFileSync(join(path, file), value);
}

function nameOf(count: number): string {
  return `vtpm-${process.pid}-${pidNamespace()}-${count}`;
}

/** Its inode. */
function pidNamespace(): string {
  return /\d+/.exec(readlinkSync('/proc/self/ns/pid'))?.[0] ?? '0';
}

/** @param isSuccessor what has this process's id is its own; otherwise it is of one that had it before */
function removeLeft(parent: string, isSuccessor: boolean): void {
  const own = pidNamespace();
  for (const name of readdirSync(parent)) {
    const [, pid, namespace] = NAME.exec(name) ?? [];
    if (pid === undefined || namespace !== own) continue;
    const isOurs = Number(pid) === process.pid;
    if (isOurs ? isSuccessor : existsSync(`/proc/${pid}`)) continue;
    try {
      rmdirSync(join(parent, name));
    } catch {
      // Something is in it, or somebody else removed it.
    }
  }
}

/** A group is busy for a moment after the end of its last process. */
export async function removeGroup(path: string): Promise<void> {
  for (let attempt = 0; attempt < REMOVE_ATTEMPTS; attempt++) {
    try {
      rmdirSync(path);
      return;
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code === 'ENOENT') return;
      await delay(REMOVE_PAUSE_MS);
    }
  }
}
