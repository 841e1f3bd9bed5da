import { readFileSync } from 'node:fs';
import { setTimeout as sleep } from 'node:timers/promises';

/** A process that cannot be mistaken for a later one with its number. */
export interface ProcessIdentity {
  readonly pid: number;
  /** Clock ticks after boot at which it began (proc_pid_stat(5), field 22). */
  readonly startTime: string;
}

/** @returns undefined where no such process runs; one that only waits to be reaped does not run */
export function identify(pid: number): ProcessIdentity | undefined {
  let stat: string;
  try {
    stat = readFileSync(`/proc/${pid}/stat`, 'latin1');
  } catch {
    return undefined;
  }
  // The program's name, in brackets, may hold anything; fields are counted from the last bracket.
  const rest = stat.slice(stat.lastIndexOf(')') + 2).split(' ');
  const [state, startTime] = [rest[0], rest[19]];
  if (state === 'Z' || state === 'X' || startTime === undefined) return undefined;
  return { pid, startTime };
}

export function isAlive(process: ProcessIdentity): boolean {
  return identify(process.pid)?.startTime === process.startTime;
}

/** @returns whether it ended within `timeout` milliseconds */
export async function waitForEnd(process: ProcessIdentity, timeout: number): Promise<boolean> {
  const end = performance.now() + timeout;
  while (isAlive(process)) {
    if (performance.now() > end) return false;
    await sleep(20);
  }
  return true;
}
