import { readdirSync } from 'node:fs';
import { constants } from 'node:os';
import { isMainThread } from 'node:worker_threads';
import { fcntl, koffi, SystemCallError } from './libc.js';

// One process that goes on as another program (execve(2)), and what libuv cannot do for the one that it becomes.
const libc = koffi.load('libc.so.6');
const execve = libc.func('int execve(const char *path, const char **arguments, const char **environment)');
const waitpid = libc.func('int waitpid(int pid, _Out_ int32_t *status, int options)');

const F_GETFD = 1;
const F_SETFD = 2;
const FD_CLOEXEC = 1;
const WNOHANG = 1;
const ECHILD = 10;
const EBADF = 9;
const STANDARD_STREAMS: readonly number[] = [0, 1, 2];

/** The environment that this program was given. What modules take out of `process.env` is still there. */
const ENVIRONMENT: Readonly<NodeJS.ProcessEnv> = { ...process.env };

/** They say what descriptors 3 and up are (sd_listen_fds(3)), which is not true any more. */
const PASSED_SOCKETS: readonly string[] = ['LISTEN_PID', 'LISTEN_FDS', 'LISTEN_FDNAMES'];

/**
 * This process goes on as another program, with the environment that this one was given: same process id, same children,
 * same parent. Of all open descriptors it keeps the three standard streams and those named. Does not return where it works.
 * @param args after the program's own name
 * @throws SystemCallError where the kernel refuses; then nothing has changed
 */
export function replaceProcess(file: string, args: readonly string[], descriptors: readonly number[]): never {
  // Children that die with their parent die with the thread that made them (prctl(2), PR_SET_PDEATHSIG).
  if (!isMainThread) throw new Error('only the main thread can go on as another program');
  const kept = new Set([...STANDARD_STREAMS, ...descriptors]);
  const changed: number[] = [];
  try {
    for (const fd of openDescriptors()) if (!kept.has(fd)) setCloseOnExec(fd, true);
    for (const fd of descriptors) {
      setCloseOnExec(fd, false);
      changed.push(fd);
    }
    // libuv makes these close-on-exec too; the new program would find its own first files in their place.
    for (const fd of STANDARD_STREAMS) setCloseOnExec(fd, false);
    const environment = Object.entries(ENVIRONMENT)
      .filter(([name]) => !PASSED_SOCKETS.includes(name))
      .map(([name, value]) => `${name}=${value}`);
    execve(file, [file, ...args, null], [...environment, null]);
    throw new SystemCallError(`execve ${file}`, koffi.errno());
  } catch (error) {
    for (const fd of changed) setCloseOnExec(fd, true);
    throw error;
  }
}

/** Whether processes that are made from now on, and programs that this one becomes, get the descriptor. @throws SystemCallError */
export function setCloseOnExec(fd: number, isClosed: boolean): void {
  const flags = Number(fcntl(fd, F_GETFD, 0));
  if (flags < 0 && koffi.errno() === EBADF && isClosed) return;
  const wanted = isClosed ? flags | FD_CLOEXEC : flags & ~FD_CLOEXEC;
  if (flags < 0 || fcntl(fd, F_SETFD, wanted) < 0)
    throw new SystemCallError('fcntl(FD_CLOEXEC)', koffi.errno());
}

/** How a child of this process ended; both null where it still runs. */
export interface ChildStatus {
  readonly code: number | null;
  readonly signal: string | null;
}

/**
 * Looks after a child that libuv knows nothing of, and removes it from the process table where it has ended (waitpid(2)).
 * @returns undefined where there is no such child of this process
 */
export function reapChild(pid: number): ChildStatus | undefined {
  const status = [0];
  const found = Number(waitpid(pid, status, WNOHANG));
  if (found === 0) return { code: null, signal: null };
  if (found < 0) {
    if (koffi.errno() === ECHILD) return undefined;
    throw new SystemCallError('waitpid', koffi.errno());
  }
  const word = status[0] ?? 0;
  const signal = word & 0x7f;
  if (signal === 0) return { code: (word >> 8) & 0xff, signal: null };
  return { code: null, signal: nameOf(signal) };
}

function nameOf(signal: number): string {
  return Object.entries(constants.signals).find(([, number]) => number === signal)?.[0] ?? `signal ${signal}`;
}

function openDescriptors(): number[] {
  return readdirSync('/proc/self/fd').map(Number);
}
