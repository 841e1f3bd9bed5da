import { spawn } from 'node:child_process';
import { closeSync, existsSync, openSync, readFileSync, renameSync, rmSync, statSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { lockFile, type Paths, privateDirectory, writeFileDurably } from 'vtpm-common';
import { isToolstackErrorCode, ToolstackError } from '../error.js';
import type { Daemon } from './http.js';
import { logFile, sayLogLine, tail } from './log-file.js';
import { nextStep } from './next-step.js';
import { identify, isAlive, type ProcessIdentity, waitForEnd } from './process-table.js';
import type { Invocation } from './programs.js';

const LOG_ROTATES_AT_BYTES = 16 * 1024 * 1024;
const POLL_MS = 20;

/** A daemon that `vtpmctl up` started, or is to start. */
export interface Background {
  readonly daemon: Daemon;
  readonly invocation: Invocation;
  readonly paths: Paths;
}

/** Only one vtpmctl starts or stops daemons of an installation at a time. The lock ends with the process. */
export function holdBackgroundLock(paths: Paths): number {
  privateDirectory(paths.run);
  const lock = lockFile(join(paths.run, 'background.lock'));
  if (lock === undefined) {
    throw new ToolstackError('busy', 'another vtpmctl up or down is at work here; wait for it');
  }
  return lock;
}

export function pidFile(paths: Paths, daemon: Daemon): string {
  return join(paths.run, `${daemon}.pid`);
}

/** The daemon that runs from an earlier `up`. A left-over file of a process that is gone is removed. */
export function runningDaemon(paths: Paths, daemon: Daemon): ProcessIdentity | undefined {
  const path = pidFile(paths, daemon);
  if (!existsSync(path)) return undefined;
  const [pid, startTime] = readFileSync(path, 'utf8').split('\n');
  const recorded = { pid: Number(pid), startTime: startTime ?? '' };
  if (Number.isInteger(recorded.pid) && recorded.pid > 0 && isAlive(recorded)) return recorded;
  rmSync(path, { force: true });
  return undefined;
}

/**
 * Starts the daemon in the background and waits until `probe` says that it answers.
 * @param probe returns undefined for "not yet"
 * @throws ToolstackError `internal` or what the daemon's last log line says, when it ends or is silent for `timeout` ms
 */
export async function startInBackground<T>(
  { daemon, invocation, paths }: Background,
  environment: NodeJS.ProcessEnv,
  probe: () => Promise<T | undefined>,
  timeout = 60_000,
): Promise<T> {
  const log = logFile(paths, daemon);
  privateDirectory(dirname(log));
  privateDirectory(paths.run);
  rotate(log);
  const before = existsSync(log) ? statSync(log).size : 0;
  const fd = openSync(log, 'a', 0o600);
  const child = spawn(invocation.file, invocation.args, {
    detached: true,
    stdio: ['ignore', fd, fd],
    cwd: '/',
    env: environment,
  });
  closeSync(fd);
  let end: string | undefined;
  child.once('error', (error) => {
    end = error.message;
  });
  child.once('exit', (code, signal) => {
    end ??= signal ? `ended by ${signal}` : `ended with status ${code}`;
  });
  const identity = child.pid === undefined ? undefined : identify(child.pid);
  if (identity) writeFileDurably(pidFile(paths, daemon), `${identity.pid}\n${identity.startTime}\n`);
  const deadline = performance.now() + timeout;
  while (end === undefined && performance.now() < deadline) {
    const answer = await probe();
    if (answer !== undefined) {
      child.removeAllListeners();
      child.unref();
      return answer;
    }
    await sleep(POLL_MS);
  }
  if (end === undefined) {
    child.removeAllListeners();
    child.unref();
    throw new ToolstackError(
      'internal',
      `the ${daemon} does not answer after ${timeout / 1000} s; see ${log}, stop it with vtpmctl down`,
    );
  }
  rmSync(pidFile(paths, daemon), { force: true });
  throw whyNotStarted(daemon, log, before, end);
}

/**
 * Asks the daemon to end and waits for it.
 * @returns false where it did not run
 * @throws ToolstackError `busy` when it still runs after `timeout` milliseconds
 */
export async function stopInBackground(paths: Paths, daemon: Daemon, timeout: number): Promise<boolean> {
  const identity = runningDaemon(paths, daemon);
  if (!identity) return false;
  process.kill(identity.pid, 'SIGTERM');
  if (!(await waitForEnd(identity, timeout))) {
    throw new ToolstackError(
      'busy',
      `the ${daemon} (process ${identity.pid}) still runs ${timeout / 1000} s after it was asked to end; ` +
        `see ${logFile(paths, daemon)}, and repeat vtpmctl down`,
    );
  }
  rmSync(pidFile(paths, daemon), { force: true });
  return true;
}

function rotate(log: string): void {
  if (existsSync(log) && statSync(log).size > LOG_ROTATES_AT_BYTES) renameSync(log, `${log}.1`);
}

/** The daemons end a refused start with `program: sentence (code)` on standard error; a bug has no code, but a stack. */
function whyNotStarted(daemon: Daemon, log: string, from: number, end: string): ToolstackError {
  const lines = tail(log, from, 50);
  for (const { text } of lines.toReversed()) {
    const said = /^vtpm-\w+: (.*?)(?: [([]([a-z-]+)[)\]])?$/.exec(text);
    if (!said?.[1]) continue;
    const code = isToolstackErrorCode(said[2]) ? said[2] : said[2] ? 'manager-refused' : 'internal';
    return new ToolstackError(code, `the ${daemon} did not start: ${nextStep(code, said[1])}`);
  }
  const last = lines.map(sayLogLine).at(-1);
  return new ToolstackError(
    'internal',
    `the ${daemon} did not start (${end}): ${last ?? 'it said nothing'}; see ${log}`,
  );
}
