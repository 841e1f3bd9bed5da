/**
 * The system calls of a worker. Both filters are made from this table and from nothing else (filter.ts), so what is not
 * here is refused from the first instruction of the worker on.
 *
 * `start`: the first filter, installed by bubblewrap before it executes node. `serve`: the second one, installed by the
 * worker itself when nothing is left to be opened or loaded, before it has an identity and so before any byte of a
 * guest. The kernel asks both, so a call that serves is in both columns.
 *
 * The rows stand in the order in which the filters ask: those of a guest's command come first, and have no condition,
 * because the kernel remembers a call that is allowed whatever its arguments are and then does not run the filter.
 */
export interface SyscallRule {
  readonly name: string;
  /** The kernel's numbers; null where the architecture has no such call. */
  readonly numbers: Readonly<Record<Architecture, number | null>>;
  readonly start: Allowance;
  readonly serve: Allowance;
  /** Who needs it, or what is taken away. */
  readonly why: string;
}

/** As Node names them (process.arch). */
export type Architecture = 'x64' | 'arm64';
export type Stage = 'start' | 'serve';

export type Allowance =
  | 'yes'
  | 'no'
  /** Where the low 32 bits of an argument, masked, are one of the values. The kernel reads no more of these arguments. */
  | { readonly argument: number; readonly mask: number; readonly values: readonly number[] };

const ANY = 0xffffffff;
const is = (argument: number, ...values: readonly number[]): Allowance => ({ argument, mask: ANY, values });
const without = (argument: number, bits: number): Allowance => ({ argument, mask: bits, values: [0] });
const withAll = (argument: number, bits: number): Allowance => ({ argument, mask: bits, values: [bits] });

/** mman.h */
const PROT_EXEC = 4;
/** sched.h */
const CLONE_THREAD = 0x10000;
/** ioctls.h: what Node asks to learn what a descriptor is, and how it sets O_NONBLOCK and close-on-exec. */
const [TCGETS, FIONBIO, FIOCLEX] = [0x5401, 0x5421, 0x5451];
/** socket.h: a guest's command stays in its socket until it is answered. */
const SO_PEEK_OFF = 42;
/** fcntl.h */
const [F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC, F_GET_SEALS] = [1, 2, 3, 4, 1030, 1034];
/** socket.h */
const AF_UNIX = 1;
/** prctl.h */
const [PR_SET_DUMPABLE, PR_SET_NAME, PR_SET_NO_NEW_PRIVS, PR_SET_VMA] = [4, 15, 38, 0x53564d41];
/** seccomp.h */
const SECCOMP_SET_MODE_FILTER = 1;

function row(
  name: string,
  x64: number | null,
  arm64: number | null,
  start: Allowance,
  serve: Allowance,
  why: string,
): SyscallRule {
  return { name, numbers: { x64, arm64 }, start, serve, why };
}

export const SYSCALLS: readonly SyscallRule[] = [
  // A guest's command and its answer.
  row('sendto', 44, 206, 'yes', 'yes', 'answers to guests'),
  row('recvfrom', 45, 207, 'yes', 'yes', 'commands of guests'),
  row('ppoll', 271, 73, 'yes', 'yes', "waits for a guest's next command outside of the event loop"),
  row('read', 0, 63, 'yes', 'yes', 'sockets, the event loop; files while it starts'),
  row('write', 1, 64, 'yes', 'yes', 'sockets, the event loop, the log'),
  row('epoll_pwait', 281, 22, 'yes', 'yes', 'event loop'),
  row('futex', 202, 98, 'yes', 'yes', 'threads'),
  row('writev', 20, 66, 'yes', 'yes', 'HTTP/2 to the manager'),
  row('readv', 19, 65, 'yes', 'yes', 'sockets'),
  row('sendmsg', 46, 211, 'yes', 'yes', 'sockets'),
  row('recvmsg', 47, 212, 'yes', 'yes', "guests' connections and links, which arrive as descriptors"),
  row('splice', 275, 76, 'yes', 'yes', 'bytes of a guest that must not be lost with the worker'),
  row('setsockopt', 54, 208, is(2, SO_PEEK_OFF), is(2, SO_PEEK_OFF), 'as above'),
  row(
    'ioctl',
    16,
    29,
    is(1, TCGETS, FIONBIO, FIOCLEX),
    is(1, TCGETS, FIONBIO, FIOCLEX),
    'as above; what kind of descriptor it was given',
  ),
  row('clock_gettime', 228, 113, 'yes', 'yes', 'clocks, where the vDSO has no fast one'),
  row('gettimeofday', 96, 169, 'yes', 'yes', 'clocks'),
  row('time', 201, null, 'yes', 'yes', 'clocks'),
  row('getpid', 39, 172, 'yes', 'yes', 'libcrypto, to notice a fork'),
  row('gettid', 186, 178, 'yes', 'yes', 'threads'),
  // Memory.
  row(
    'mmap',
    9,
    222,
    'yes',
    without(2, PROT_EXEC),
    'memory, also shared with guests; code is mapped only while it starts',
  ),
  row('mprotect', 10, 226, 'yes', 'yes', "memory; V8's compiler makes its own pages executable"),
  row('munmap', 11, 215, 'yes', 'yes', 'memory'),
  row('mremap', 25, 216, 'yes', 'yes', 'memory'),
  row('madvise', 28, 233, 'yes', 'yes', 'memory'),
  row('brk', 12, 214, 'yes', 'yes', 'memory'),
  row('membarrier', 324, 283, 'yes', 'yes', "V8's collector"),
  // The event loop and its sockets.
  row('epoll_ctl', 233, 21, 'yes', 'yes', 'event loop'),
  row('epoll_wait', 232, null, 'yes', 'yes', 'event loop'),
  row('poll', 7, null, 'yes', 'yes', 'event loop'),
  row('close', 3, 57, 'yes', 'yes', 'connections that end'),
  row('shutdown', 48, 210, 'yes', 'yes', 'connections that end'),
  row('fstat', 5, 80, 'yes', 'yes', 'what kind of descriptor it was given'),
  row('getsockname', 51, 204, 'yes', 'yes', 'what kind of descriptor it was given'),
  row('getpeername', 52, 205, 'yes', 'yes', 'what kind of descriptor it was given'),
  row('getsockopt', 55, 209, 'yes', 'yes', 'what kind of descriptor it was given; who its peer is'),
  row(
    'fcntl',
    72,
    25,
    is(1, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC, F_GET_SEALS),
    is(1, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC, F_GET_SEALS),
    'what kind of descriptor it was given; that memory which a guest shares cannot be made smaller under it',
  ),
  row('pread64', 17, 67, 'yes', 'yes', 'shared memory that it was given; libraries while it starts'),
  row('pwrite64', 18, 68, 'yes', 'yes', 'shared memory that it was given'),
  row('fsync', 74, 82, 'yes', 'yes', "koffi's flush of standard output at the end"),
  row('getrandom', 318, 278, 'yes', 'yes', 'random numbers'),
  // Time, signals, threads, the end.
  row('clock_getres', 229, 114, 'yes', 'yes', 'clocks'),
  row('clock_nanosleep', 230, 115, 'yes', 'yes', 'threads that wait'),
  row('nanosleep', 35, 101, 'yes', 'yes', 'threads that wait'),
  row('sched_yield', 24, 124, 'yes', 'yes', 'threads'),
  row('sched_getaffinity', 204, 123, 'yes', 'yes', 'threads'),
  row('getcpu', 309, 168, 'yes', 'yes', 'threads'),
  row('getrusage', 98, 165, 'yes', 'yes', 'its own processor time'),
  row('rt_sigaction', 13, 134, 'yes', 'yes', 'signals'),
  row('rt_sigprocmask', 14, 135, 'yes', 'yes', 'signals'),
  row('rt_sigreturn', 15, 139, 'yes', 'yes', 'signals'),
  row('sigaltstack', 131, 132, 'yes', 'yes', 'signals'),
  row('restart_syscall', 219, 128, 'yes', 'yes', 'a call that a signal interrupted'),
  row(
    'tgkill',
    234,
    131,
    'yes',
    'yes',
    'abort(); it reaches the threads of processes of its own namespace only',
  ),
  row('exit', 60, 93, 'yes', 'yes', 'threads that end'),
  row('exit_group', 231, 94, 'yes', 'yes', 'the end'),
  // From here on: only until it is ready.
  row('openat', 257, 56, 'yes', 'no', 'no file is opened by a worker that serves'),
  row('execve', 59, 221, 'yes', 'no', 'bubblewrap executes node once; no other program ever'),
  row(
    'clone',
    56,
    220,
    withAll(0, CLONE_THREAD),
    'no',
    'threads of node; never a process, never a namespace',
  ),
  row(
    'prctl',
    157,
    167,
    is(0, PR_SET_DUMPABLE, PR_SET_NAME, PR_SET_NO_NEW_PRIVS, PR_SET_VMA),
    'no',
    'gives up',
  ),
  row('seccomp', 317, 277, is(0, SECCOMP_SET_MODE_FILTER), 'no', 'installs the second filter'),
  row('wait4', 61, 260, 'yes', 'no', "bubblewrap's own first process waits for node"),
  row('access', 21, null, 'yes', 'no', 'looks for files'),
  row('faccessat', 269, 48, 'yes', 'no', 'looks for files'),
  row('faccessat2', 439, 439, 'yes', 'no', 'looks for files'),
  row('newfstatat', 262, 79, 'yes', 'no', 'looks for files'),
  row('statx', 332, 291, 'yes', 'no', 'looks for files'),
  row('readlink', 89, null, 'yes', 'no', 'looks for files'),
  row('readlinkat', 267, 78, 'yes', 'no', 'looks for files'),
  row('getcwd', 79, 17, 'yes', 'no', 'looks for files'),
  row('lseek', 8, 62, 'yes', 'no', 'files'),
  row('set_tid_address', 218, 96, 'yes', 'no', 'threads that begin'),
  // No thread can be made any more, but one that was made just before may not have begun, and glibc ends the process
  // where it may not register itself.
  row('set_robust_list', 273, 99, 'yes', 'yes', 'threads that begin'),
  row('rseq', 334, 293, 'yes', 'yes', 'threads that begin'),
  // The locks of the V8 of Node.js 24 ask how their thread is scheduled.
  row('sched_getparam', 143, 121, 'yes', 'yes', 'threads'),
  row('sched_getscheduler', 145, 120, 'yes', 'yes', 'threads'),
  row('arch_prctl', 158, null, 'yes', 'no', 'threads that begin'),
  row('prlimit64', 302, 261, 'yes', 'no', 'reads its limits; raising one takes a capability'),
  row('pkey_alloc', 330, 289, 'yes', 'no', 'V8 asks whether there are protection keys'),
  row('pipe2', 293, 59, 'yes', 'no', 'event loop'),
  row('eventfd2', 290, 19, 'yes', 'no', 'event loop'),
  row('epoll_create1', 291, 20, 'yes', 'no', 'event loop'),
  row('socketpair', 53, 199, is(0, AF_UNIX), 'no', 'a pair for a rehearsal'),
  row('dup', 32, 23, 'yes', 'no', 'event loop'),
  row('dup2', 33, null, 'yes', 'no', 'event loop'),
  row('dup3', 292, 24, 'yes', 'no', 'event loop'),
  row('uname', 63, 160, 'yes', 'no', 'what machine it is on'),
  row('sysinfo', 99, 179, 'yes', 'no', 'what machine it is on'),
  row('getuid', 102, 174, 'yes', 'no', 'who it is'),
  row('geteuid', 107, 175, 'yes', 'no', 'who it is'),
  row('getgid', 104, 176, 'yes', 'no', 'who it is'),
  row('getegid', 108, 177, 'yes', 'no', 'who it is'),
  row('capget', 125, 90, 'yes', 'no', 'who it is'),
];

/**
 * Answered with ENOSYS and not EPERM: glibc then makes its threads with clone(2), whose flags a filter can see; those
 * of clone3(2) are in memory.
 */
export const ABSENT: Readonly<Record<Architecture, readonly number[]>> = { x64: [435], arm64: [435] };
