import { readdirSync, readFileSync } from 'node:fs';
import { setTimeout as delay } from 'node:timers/promises';
import { ToolstackError } from '../error.js';

/** A process that cannot be taken for a later one of the same pid (proc(5), /proc/pid/stat field 22). */
export interface ProcessId {
  readonly pid: number;
  /** Clock ticks after boot. */
  readonly startTime: string;
}

/** @returns undefined where there is no such process @throws where that cannot be known, such as EMFILE */
export function processId(pid: number): ProcessId | undefined {
  const startTime = statFields(`/proc/${pid}/stat`)?.[19];
  return startTime === undefined ? undefined : { pid, startTime };
}

/**
 * Whether anything of the process can still run. A zombie cannot, and nobody but its parent can remove it; but a zombie
 * main thread says nothing about the other threads, so all are looked at.
 */
export function isAlive(process: ProcessId): boolean {
  try {
    return canRun(process);
  } catch {
    // Without a free descriptor nothing can be seen, and that is no proof of death.
    return true;
  }
}

function canRun(process: ProcessId): boolean {
  if (statFields(`/proc/${process.pid}/stat`)?.[19] !== process.startTime) return false;
  return listDirectory(`/proc/${process.pid}/task`).some((task) => {
    const state = statFields(`/proc/${process.pid}/task/${task}/stat`)?.[0];
    return state !== undefined && state !== 'Z' && state !== 'X';
  });
}

/** Children, their children and so on: parents first. */
export function descendants(pid: number): ProcessId[] {
  const found: ProcessId[] = [];
  for (const task of listDirectory(`/proc/${pid}/task`)) {
    for (const child of readText(`/proc/${pid}/task/${task}/children`).split(' ')) {
      const id = child === '' ? undefined : processId(Number(child));
      if (id) found.push(id, ...descendants(id.pid));
    }
  }
  return found;
}

/** Between two looks at processes that were killed. */
const LONGEST_WAIT_MS = 8;

/**
 * Kills, and resolves when none of them can run any more: only then may another live copy of the same vTPM exist (I-3).
 * @throws ToolstackError `busy` where one is still there after `limitMs` (a process in an uninterruptible wait)
 */
export async function killAndWait(processes: readonly ProcessId[], limitMs = 30_000): Promise<void> {
  const until = performance.now() + limitMs;
  for (let wait = 1; ; wait = Math.min(2 * wait, LONGEST_WAIT_MS)) {
    const alive = processes.filter(isAlive);
    if (alive.length === 0) return;
    for (const { pid } of alive) signal(pid);
    if (performance.now() > until) {
      throw new ToolstackError(
        'busy',
        `process ${alive.map(({ pid }) => pid).join(', ')} does not end although it was killed; it waits in the kernel, look at its disk or restart the host`,
      );
    }
    await delay(wait);
  }
}

function signal(pid: number): void {
  try {
    process.kill(pid, 'SIGKILL');
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'ESRCH') throw error;
  }
}

/** The fields after the command name, which may itself hold blanks and parentheses. */
function statFields(path: string): string[] | undefined {
  const text = readText(path);
  return text === '' ? undefined : text.slice(text.lastIndexOf(')') + 2).split(' ');
}

function readText(path: string): string {
  try {
    return readFileSync(path, 'utf8').trim();
  } catch (error) {
    if (isGone(error)) return '';
    throw error;
  }
}

function listDirectory(path: string): string[] {
  try {
    return readdirSync(path);
  } catch (error) {
    if (isGone(error)) return [];
    throw error;
  }
}

/** Of anything else it is not known whether the process is there. */
function isGone(error: unknown): boolean {
  const { code } = error as NodeJS.ErrnoException;
  return code === 'ENOENT' || code === 'ESRCH';
}
