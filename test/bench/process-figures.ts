import { execFileSync } from 'node:child_process';
import { readdirSync, readFileSync } from 'node:fs';
import { cpus } from 'node:os';

/** USER_HZ: what /proc counts CPU time in. The same on every Linux that Node runs on. */
const TICKS_PER_SECOND = 100;

/** CPU seconds that the processes used so far, their waited-for children not included (proc(5), stat fields 14, 15). */
export function cpuSeconds(pids: readonly number[]): number {
  return pids.reduce((sum, pid) => {
    const fields = afterName(readFileSync(`/proc/${pid}/stat`, 'utf8'));
    return sum + (Number(fields[11]) + Number(fields[12])) / TICKS_PER_SECOND;
  }, 0);
}

/** CPU milliseconds of all threads, as exactly as the scheduler counts them (proc(5), schedstat); 0 where it is gone. */
export function cpuMilliseconds(pid: number): number {
  try {
    return readdirSync(`/proc/${pid}/task`).reduce((sum, task) => {
      const [running] = readFileSync(`/proc/${pid}/task/${task}/schedstat`, 'utf8').split(' ');
      return sum + Number(running) / 1e6;
    }, 0);
  } catch {
    return 0;
  }
}

/** MiB of page tables, which the kernel holds for this process alone (proc(5), status, VmPTE). */
export function pageTableMiB(pid: number): number {
  return Number(/^VmPTE:\s+(\d+) kB$/m.exec(readFileSync(`/proc/${pid}/status`, 'utf8'))?.[1]) / 1024;
}

/** MiB that only this process holds (proc(5), smaps_rollup, Private_*). Needs root for a worker. */
export function privateMiB(pid: number): number {
  const text = readFileSync(`/proc/${pid}/smaps_rollup`, 'utf8');
  let kibibytes = 0;
  for (const [, value] of text.matchAll(/^Private_(?:Clean|Dirty|Hugetlb): +(\d+) kB$/gm)) {
    kibibytes += Number(value);
  }
  return kibibytes / 1024;
}

/** The most that was resident at once, in MiB (proc(5), status, VmHWM). */
export function peakMiB(pid: number): number {
  return Number(/^VmHWM:\s+(\d+) kB$/m.exec(readFileSync(`/proc/${pid}/status`, 'utf8'))?.[1]) / 1024;
}

/**
 * Keeps all threads of a process on one CPU, or with undefined lets them go where they like. Whether client and TPM share
 * a CPU is luck otherwise, and decides more about a round trip of 20 microseconds than either of them.
 */
export function pin(pid: number, cpu: number | undefined): void {
  if (cpus().length < 2) return;
  execFileSync(
    'taskset',
    ['-a', '-p', '-c', cpu === undefined ? `0-${cpus().length - 1}` : `${cpu}`, `${pid}`],
    {
      stdio: ['ignore', 'ignore', 'inherit'],
    },
  );
}

/** The process and all processes below it. */
export function family(root: number): number[] {
  const parents = new Map<number, number>();
  for (const name of readdirSync('/proc')) {
    if (!/^\d+$/.test(name)) continue;
    try {
      parents.set(Number(name), Number(afterName(readFileSync(`/proc/${name}/stat`, 'utf8'))[1]));
    } catch {
      // It ended meanwhile.
    }
  }
  const members = [root];
  for (const member of members) {
    for (const [pid, parent] of parents) if (parent === member) members.push(pid);
  }
  return members;
}

/** Fields 3 and later; the name before them may hold anything. */
function afterName(stat: string): string[] {
  return stat.slice(stat.lastIndexOf(')') + 2).split(' ');
}
