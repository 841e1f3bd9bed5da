import { writeSync } from 'node:fs';
import { createRequire } from 'node:module';

/** What a worker that belongs to its guest tries, by the raw system call: no library refuses anything on the way. */

const koffi = createRequire(import.meta.url)('koffi') as typeof import('koffi');
const libc = koffi.load('libc.so.6');
const raw = libc.func('long syscall(long, long, long, long, long, long, long)');
const errorName = libc.func('const char *strerrorname_np(int)');

export interface Targets {
  /** Files of the host that no worker may read. */
  readonly files: Readonly<Record<string, string>>;
  /** A path on the host where a file could be made. */
  readonly newFile: string;
  /** A unix socket of the host. */
  readonly socket: string;
  /** Processes of the host that no worker may see. */
  readonly processes: Readonly<Record<string, number>>;
}

/** `ok`, or the name of the errno. */
export type Outcomes = Readonly<Record<string, string>>;

type Argument = number | bigint | string | Buffer;

// x86_64 and aarch64.
const NUMBERS = {
  openat: [257, 56],
  openat2: [437, 437],
  open_by_handle_at: [304, 265],
  memfd_create: [319, 279],
  socket: [41, 198],
  socketpair: [53, 199],
  connect: [42, 203],
  clone: [56, 220],
  clone3: [435, 435],
  wait4: [61, 260],
  ptrace: [101, 117],
  process_vm_readv: [310, 270],
  pidfd_open: [434, 434],
  kill: [62, 129],
  unshare: [272, 97],
  setns: [308, 268],
  mount: [165, 40],
  chroot: [161, 51],
  setresuid: [117, 147],
  setgroups: [116, 159],
  capset: [126, 91],
  prctl: [157, 167],
  seccomp: [317, 277],
  prlimit64: [302, 261],
  keyctl: [250, 219],
  bpf: [321, 280],
  io_uring_setup: [425, 425],
  userfaultfd: [323, 282],
  perf_event_open: [298, 241],
  inotify_init1: [294, 26],
  getpid: [39, 172],
  fstat: [5, 80],
  mmap: [9, 222],
  newfstatat: [262, 79],
  readlinkat: [267, 78],
  kexec_load: [246, 104],
} as const;

const kept: Buffer[] = [];

function call(name: keyof typeof NUMBERS, ...given: Argument[]): number {
  const args = [...given, 0, 0, 0, 0, 0, 0].slice(0, 6).map((value) => {
    if (typeof value !== 'string' && !Buffer.isBuffer(value)) return value;
    const bytes = typeof value === 'string' ? Buffer.from(`${value}\0`) : value;
    // Its address alone does not keep it.
    kept.push(bytes);
    return koffi.address(bytes);
  });
  return Number(raw(NUMBERS[name][process.arch === 'x64' ? 0 : 1], ...args));
}

function outcome(result: number): string {
  return result === -1 ? String(errorName(koffi.errno())) : 'ok';
}

const SIGCHLD = 17;
const [AT_FDCWD, AT_EMPTY_PATH] = [-100, 0x1000];
const [O_CREAT_WRONLY, AF_UNIX, AF_INET, AF_NETLINK, AF_VSOCK] = [0o101, 1, 2, 16, 40];
const [CLONE_NEWNS, CLONE_NEWUSER] = [0x20000, 0x10000000];

const posixSpawn = libc.func(
  'int posix_spawn(_Out_ int32_t *pid, const char *path, void *actions, void *attributes, void *argv, void *env)',
);
const pthreadCreate = libc.func(
  'int pthread_create(_Out_ uint64_t *id, void *attributes, void *start, void *argument)',
);
const pause = koffi.address(libc.symbol('pause', 'char'));

function pointers(...texts: string[]): Buffer {
  const list = Buffer.alloc(8 * (texts.length + 1));
  for (const [index, text] of texts.entries()) {
    const bytes = Buffer.from(`${text}\0`);
    kept.push(bytes);
    list.writeBigUInt64LE(koffi.address(bytes), 8 * index);
  }
  return list;
}

/** Executes a program. @returns its process id, or minus an errno */
function spawn(path: string, ...args: string[]): number {
  const pid = [0];
  const error = Number(posixSpawn(pid, path, null, null, pointers(path, ...args), pointers()));
  return error === 0 ? (pid[0] ?? 0) : -error;
}

/** The child cannot go on where V8 has forbidden its pages to be inherited; what counts is that there is one. */
function fork(flags: number): string {
  const child = call('clone', flags | SIGCHLD);
  if (child > 0) call('wait4', child, 0);
  return outcome(child);
}

function socketAddress(path: string): Buffer {
  const address = Buffer.alloc(110);
  address.writeUInt16LE(AF_UNIX, 0);
  address.write(path, 2);
  return address;
}

function connectTo(path: string): number {
  const fd = call('socket', AF_UNIX, 1);
  return fd === -1 ? -1 : call('connect', fd, socketAddress(path), 110);
}

function attempts({ files, newFile, socket, processes }: Targets): Record<string, () => string> {
  const named = <T>(what: string, of: Readonly<Record<string, T>>, run: (value: T) => string) =>
    Object.fromEntries(Object.entries(of).map(([name, value]) => [`${what} ${name}`, () => run(value)]));
  const own = call('getpid');
  return {
    ...named('open', files, (path) => outcome(call('openat', AT_FDCWD, path))),
    'open its own program': () => outcome(call('openat', AT_FDCWD, '/proc/self/exe')),
    'open with openat2': () => outcome(call('openat2', AT_FDCWD, '/proc/self/exe', Buffer.alloc(24), 24)),
    'create a file': () => outcome(call('openat', AT_FDCWD, newFile, O_CREAT_WRONLY, 0o600)),
    'make a file in memory': () => outcome(call('memfd_create', 'x')),
    'look for a file': () => outcome(call('newfstatat', AT_FDCWD, '/proc/self/exe', Buffer.alloc(256))),
    'read a link': () => outcome(call('readlinkat', AT_FDCWD, '/proc/self/exe', Buffer.alloc(64), 64)),
    'make a unix socket': () => outcome(call('socket', AF_UNIX, 1)),
    'make an internet socket': () => outcome(call('socket', AF_INET, 1)),
    'make a netlink socket': () => outcome(call('socket', AF_NETLINK, 3)),
    'make two connected sockets': () => outcome(call('socketpair', AF_UNIX, 1, 0, Buffer.alloc(8))),
    "connect to the manager's socket": () => outcome(connectTo(socket)),
    'make a process': () => fork(0),
    'make a process with clone3': () => {
      const args = Buffer.alloc(64);
      args.writeBigUInt64LE(BigInt(SIGCHLD), 32);
      const child = call('clone3', args, 64);
      if (child > 0) call('wait4', child, 0);
      return outcome(child);
    },
    'make a thread': () => {
      const error = makeThread();
      return error === 0 ? 'ok' : String(errorName(error));
    },
    'execute a program': () => {
      const child = spawn('/bin/true');
      if (child > 0) call('wait4', child, 0);
      return child > 0 ? 'ok' : String(errorName(-child));
    },
    'trace a process': () => {
      const child = spawn('/bin/sleep', '600');
      const result = outcome(call('ptrace', 0x4206, child > 0 ? child : own));
      if (child > 0 && call('kill', child, 9) === 0) call('wait4', child, 0);
      return result;
    },
    'read memory by process': () => {
      const [from, to] = [Buffer.alloc(8), Buffer.alloc(8)];
      const vectors = [from, to].map((buffer) => {
        const vector = Buffer.alloc(16);
        vector.writeBigUInt64LE(koffi.address(buffer), 0);
        vector.writeBigUInt64LE(8n, 8);
        return vector;
      });
      return outcome(call('process_vm_readv', own, vectors[0]!, 1, vectors[1]!, 1));
    },
    'hold a process': () => outcome(call('pidfd_open', own)),
    'signal itself': () => outcome(call('kill', own)),
    ...named('signal', processes, (pid) => outcome(call('kill', pid))),
    'make a user namespace': () => fork(CLONE_NEWUSER),
    'make namespaces': () => fork(CLONE_NEWUSER | CLONE_NEWNS),
    'set its uid': () => outcome(call('setresuid', -1, -1, -1)),
    'look at its filter': () => outcome(call('prctl', 21)),
    'ask for filters': () => {
      const action = Buffer.alloc(4);
      action.writeUInt32LE(0x7fff0000);
      return outcome(call('seccomp', 2, 0, action));
    },
    'be dumpable again': () => outcome(call('prctl', 4, 1)),
    'look at its limits': () => outcome(call('prlimit64', 0, 7, 0, Buffer.alloc(16))),
    'watch files': () => outcome(call('inotify_init1', 0)),
    'map memory as code': () => outcome(call('mmap', 0, 4096, 7, 0x22, -1)),
  };
}

/** What has no positive control everywhere: some kernels and some users are refused it anyway. It must not succeed. */
function moreAttempts(): Record<string, () => string> {
  return {
    'set uid 0': () => outcome(call('setresuid', 0, 0, 0)),
    'set no groups': () => outcome(call('setgroups', 0, 0)),
    'take capabilities': () => {
      const header = Buffer.alloc(8);
      header.writeUInt32LE(0x20080522);
      return outcome(call('capset', header, Buffer.alloc(24, 0xff)));
    },
    'drop the filter': () => outcome(call('prctl', 22, 0)),
    'allow new privileges': () => outcome(call('prctl', 38, 0)),
    'leave its mount namespace': () => outcome(call('unshare', CLONE_NEWNS)),
    mount: () => outcome(call('mount', 'none', '/nowhere', 'tmpfs')),
    'change its root': () => outcome(call('chroot', '/nowhere')),
    'join a namespace': () => outcome(call('setns', 0, 0)),
    'raise a limit': () => {
      const limit = Buffer.alloc(16, 0xff);
      return outcome(call('prlimit64', 0, 4, limit, 0));
    },
    'open by handle': () => outcome(call('open_by_handle_at', AT_FDCWD, Buffer.alloc(136), AT_EMPTY_PATH)),
    'make a vsock socket': () => outcome(call('socket', AF_VSOCK, 1)),
    'use the key ring': () => outcome(call('keyctl', 0, -3, 1)),
    'load a BPF program': () => outcome(call('bpf', 5, Buffer.alloc(128), 128)),
    'make an io_uring': () => outcome(call('io_uring_setup', 8, Buffer.alloc(128))),
    'handle page faults': () => outcome(call('userfaultfd', 1)),
    'read counters': () => outcome(call('perf_event_open', Buffer.alloc(128), 0, -1, -1, 0)),
    'load a kernel': () => outcome(call('kexec_load', 0, 0, 0, 0)),
  };
}

const KINDS: Readonly<Record<number, string>> = {
  0: 'event loop',
  1: 'pipe',
  2: 'device',
  4: 'directory',
  8: 'file',
  12: 'socket',
};

/** What kinds of descriptors it has, by the type of st_mode (inode(7)). */
function descriptors(): string[] {
  const stat = Buffer.alloc(144);
  const kinds = new Set<string>();
  for (let fd = 0; fd < 4096; fd++) {
    if (call('fstat', fd, stat) === -1) continue;
    const mode = stat.readUInt32LE(process.arch === 'x64' ? 24 : 16);
    kinds.add(KINDS[mode >> 12] ?? `type ${mode >> 12}`);
  }
  return [...kinds].sort();
}

function say(report: object): void {
  writeSync(2, `${JSON.stringify({ level: 30, msg: 'report', ...report })}\n`);
}

function tryAll(list: Record<string, () => string>): Outcomes {
  return Object.fromEntries(Object.entries(list).map(([name, attempt]) => [name, attempt()]));
}

const THREADS = 400;

function makeThread(): number {
  return Number(pthreadCreate([0n], null, pause, null));
}

/** Makes threads, which are limited as processes are and live on, until none can be made. */
function bomb(): { made: number; end: string } {
  for (let made = 0; made < THREADS; made++) {
    const error = makeThread();
    if (error !== 0) return { made, end: String(errorName(error)) };
  }
  return { made: THREADS, end: 'ok' };
}

const HOG_MIB = 1024;

/** Takes memory until there is none. */
function hog(): { mib: number } {
  const held: Buffer[] = [];
  try {
    while (held.length * 16 < HOG_MIB) held.push(Buffer.alloc(16 << 20, 1));
  } catch {
    // So far and no further.
  }
  return { mib: held.length * 16 };
}

/**
 * Prepares a worker to run all of this when it is told to: by its first command, which is its own Startup, after the second
 * filter and after Load; SIGUSR2 lets it take memory, SIGWINCH processes. It reports on standard error.
 */
export function turnHostile(targets: Targets): void {
  let isDone = false;
  (globalThis as Record<symbol, unknown>)[Symbol.for('vtpm.barrier')] = (name: string) => {
    if (name !== 'before-process' || isDone) return;
    isDone = true;
    say({
      attempts: tryAll(attempts(targets)),
      more: tryAll(moreAttempts()),
      descriptors: descriptors(),
      environment: process.env,
    });
  };
  process.on('SIGUSR2', () => say({ hog: hog() }));
  process.on('SIGWINCH', () => say({ bomb: bomb() }));
}
