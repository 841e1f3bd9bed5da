import { type StdioOptions, spawn } from 'node:child_process';
import { once } from 'node:events';
import { closeSync, writeSync } from 'node:fs';
import type { SwtpmOptions } from './swtpm-arguments.js';

/** In the environment of the process that stays: the descriptor on which it says that it is up. */
const READY_FD = 'VTPM_DROPIN_READY_FD';

export function isBackground(env: NodeJS.ProcessEnv = process.env): boolean {
  return env[READY_FD] !== undefined;
}

/**
 * Goes into the background, for `--daemon`: another process with the same arguments, and with the descriptors that they name,
 * stays. Node.js cannot fork. Resolves when that one is up, or has ended.
 * @returns the exit status of this process
 */
export async function toBackground(options: SwtpmOptions): Promise<number> {
  const stdio: StdioOptions = ['ignore', 'ignore', 'pipe'];
  for (const fd of descriptorsOf(options)) stdio[fd] = fd;
  const ready = stdio.length;
  stdio[ready] = 'pipe';
  const child = spawn(process.execPath, [...process.execArgv, ...process.argv.slice(1)], {
    stdio,
    detached: true,
    env: { ...process.env, [READY_FD]: String(ready) },
  });
  child.stderr?.pipe(process.stderr);
  const up = child.stdio[ready];
  const isUp = up ? once(up, 'data').then(() => 0) : Promise.resolve(1);
  const hasEnded = once(child, 'exit').then(([status]: unknown[]) => (status === 0 ? 0 : 1));
  return await Promise.race([isUp, hasEnded]);
}

/** The sockets are there and the pid is written: who waits for the command need not wait longer. */
export function sayReady(env: NodeJS.ProcessEnv = process.env): void {
  const fd = Number(env[READY_FD]);
  if (!Number.isInteger(fd)) return;
  delete env[READY_FD];
  // The process that would show it ends now.
  process.stderr.on('error', () => undefined);
  try {
    writeSync(fd, '\n');
  } finally {
    closeSync(fd);
  }
}

function descriptorsOf({ server, control, pid, log }: SwtpmOptions): number[] {
  const named = [server, control, pid, log].flatMap((item) => (item && 'fd' in item ? [item.fd] : []));
  return [...new Set(named)].filter((fd) => fd > 2);
}
