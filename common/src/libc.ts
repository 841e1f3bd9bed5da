import { closeSync, ftruncateSync, openSync, writeSync } from 'node:fs';
import { createRequire } from 'node:module';
import type { Server, Socket } from 'node:net';

// koffi is CommonJS; the worker's bundle resolves it beside itself through this same call.
type Koffi = typeof import('koffi');
export const koffi: Koffi = createRequire(import.meta.url)('koffi') as Koffi;

const libc = koffi.load('libc.so.6');
// ssize_t is unknown to koffi; `long` has the same width on every 64-bit Linux.
const getsockopt = libc.func(
  'int getsockopt(int fd, int level, int name, void *value, _Inout_ uint32_t *length)',
);
const getOption = libc.func(
  'int getsockopt(int fd, int level, int name, _Out_ int32_t *value, _Inout_ uint32_t *length)',
);
const socketpair = libc.func('int socketpair(int domain, int type, int protocol, _Out_ int32_t *pair)');
const sendmsg = libc.func('long sendmsg(int fd, void *header, int flags)');
const recvmsg = libc.func('long recvmsg(int fd, void *header, int flags)');
const shutdown = libc.func('int shutdown(int fd, int how)');
const flock = libc.func('int flock(int fd, int operation)');
const pipe2 = libc.func('int pipe2(_Out_ int32_t *pair, int flags)');
/** prctl(2). */
export const prctl = libc.func(
  'int prctl(int option, unsigned long a, unsigned long b, unsigned long c, unsigned long d)',
);
const memfdCreate = libc.func('int memfd_create(const char *name, unsigned int flags)');
/** fcntl(2). Variadic; every argument is passed as the kernel takes it. */
export const fcntl = libc.func('int fcntl(int fd, int command, long argument)');
const fcntlLock = libc.func('int fcntl(int fd, int command, void *lock)');
const strerror = libc.func('const char *strerror(int number)');

const SOL_SOCKET = 1;
const SO_PEERCRED = 17;
const AF_UNIX = 1;
const SOCK_STREAM = 1;
/** The same bit as O_CLOEXEC. */
const SOCK_CLOEXEC = 0o2000000;
const SCM_RIGHTS = 1;
/** Of one descriptor. */
const CMSG_LEN = 20n;
const MSG_NOSIGNAL = 0x4000;
const MSG_DONTWAIT = 0x40;
const MSG_CMSG_CLOEXEC = 0x40000000;
const SHUT_RDWR = 2;
const LOCK_EX_NB = 2 | 4;
const PR_SET_DUMPABLE = 4;
const EAGAIN = 11;
const ENOTCONN = 107;
const F_DUPFD_CLOEXEC = 1030;
const F_OFD_SETLK = 37;
const F_WRLCK = 1;
const F_UNLCK = 2;
const MFD_CLOEXEC = 1;
const MFD_ALLOW_SEALING = 2;
const F_ADD_SEALS = 1033;
const F_SETPIPE_SZ = 1031;
/** F_SEAL_SEAL, SHRINK, GROW and WRITE. */
const SEAL_ALL = 0xf;
const O_NONBLOCK = 0o4000;
/** F_SEAL_SEAL, F_SEAL_SHRINK and F_SEAL_GROW (fcntl(2)). */
const SEALS_OF_SIZE = 0x1 | 0x2 | 0x4;

/** A system call failed; `errno` is its number. */
export class SystemCallError extends Error {
  override readonly name = 'SystemCallError';
  constructor(
    readonly call: string,
    readonly errno: number,
  ) {
    super(`${call}: ${String(strerror(errno))}`);
  }
}

export interface PeerCredentials {
  readonly pid: number;
  readonly uid: number;
  readonly gid: number;
}

/** Who is at the other end of a unix stream socket (unix(7), SO_PEERCRED). */
export function peerCredentials(fd: number): PeerCredentials {
  const value = Buffer.alloc(12);
  const length = [12];
  if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, value, length) !== 0) fail('getsockopt(SO_PEERCRED)');
  return { pid: value.readInt32LE(0), uid: value.readUInt32LE(4), gid: value.readUInt32LE(8) };
}

/** An int of the level SOL_SOCKET (socket(7)). @returns undefined where there is none, as of what is no socket */
export function socketOption(fd: number, name: number): number | undefined {
  const value = [0];
  return Number(getOption(fd, SOL_SOCKET, name, value, [4])) === 0 ? value[0] : undefined;
}

/** The descriptor under a net.Socket or net.Server. Node has no public way to it. */
export function socketFd(socket: Socket | Server): number {
  const fd = (socket as unknown as { _handle?: { fd?: number } })._handle?.fd;
  if (typeof fd !== 'number' || fd < 0) throw new Error('the socket has no descriptor: it is closed');
  return fd;
}

/** Two connected unix stream sockets, close-on-exec. The caller closes them. */
export function socketPair(): [number, number] {
  const pair = [0, 0];
  if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) !== 0) fail('socketpair');
  return [pair[0] ?? -1, pair[1] ?? -1];
}

/** Ends a connection for everybody who has a descriptor of it (shutdown(2), both directions). */
export function shutDownSocket(fd: number): void {
  if (shutdown(fd, SHUT_RDWR) !== 0 && koffi.errno() !== ENOTCONN) fail('shutdown');
}

/** Another descriptor of the same file, close-on-exec (fcntl(2), F_DUPFD_CLOEXEC). The caller closes it. */
export function duplicate(fd: number): number {
  const copy = Number(fcntl(fd, F_DUPFD_CLOEXEC, 3));
  if (copy < 0) fail('fcntl(F_DUPFD_CLOEXEC)');
  return copy;
}

/** A pipe that never blocks, close-on-exec. The caller closes both ends. */
export function pipePair(): { readonly read: number; readonly write: number } {
  const pair = [0, 0];
  if (pipe2(pair, O_NONBLOCK | SOCK_CLOEXEC) !== 0) fail('pipe2');
  return { read: pair[0] ?? -1, write: pair[1] ?? -1 };
}

/**
 * Gives a pipe room for so many bytes, a power of two of pages (fcntl(2), F_SETPIPE_SZ). Without privileges there is a limit
 * for all pipes of a user. @returns whether it has it
 */
export function setPipeRoom(fd: number, bytes: number): boolean {
  return fcntl(fd, F_SETPIPE_SZ, bytes) >= bytes;
}

/**
 * Zeroed memory behind a descriptor, close-on-exec, that nobody can make smaller or larger (memfd_create(2)): who has it
 * mapped is safe from the others. The caller closes it.
 */
export function sharedMemory(name: string, bytes: number): number {
  return memoryFile(name, SEALS_OF_SIZE, (fd) => ftruncateSync(fd, bytes));
}

/** Sends one byte, or `payload`, with a copy of descriptor `passed` (unix(7), SCM_RIGHTS). */
export function sendDescriptor(fd: number, passed: number, payload: Uint8Array = ONE_BYTE): void {
  const message = messageHeader(payload);
  message.control.writeInt32LE(passed, 16);
  const sent = Number(sendmsg(fd, message.header, MSG_NOSIGNAL | MSG_DONTWAIT));
  if (sent !== payload.length) fail('sendmsg(SCM_RIGHTS)');
}

const ONE_BYTE = Buffer.from([0x66]);

/** Receives what `sendDescriptor` sent, and of several descriptors in one message the first. @returns undefined where nothing is waiting */
export function receiveDescriptor(fd: number): number | undefined {
  const message = messageHeader();
  message.control.fill(0);
  const received = Number(recvmsg(fd, message.header, MSG_DONTWAIT | MSG_CMSG_CLOEXEC));
  if (received === -1 && koffi.errno() !== EAGAIN) fail('recvmsg(SCM_RIGHTS)');
  const isRights =
    message.control.readBigUInt64LE(0) === CMSG_LEN &&
    message.control.readInt32LE(8) === SOL_SOCKET &&
    message.control.readInt32LE(12) === SCM_RIGHTS;
  if (!isRights) return undefined;
  const passed = message.control.readInt32LE(16);
  if (received === 1) return passed;
  closeSync(passed);
  return undefined;
}

/** A file in memory that nobody can change any more (memfd_create(2), sealed), close-on-exec. The caller closes it. */
export function sealedMemory(name: string, content: Uint8Array): number {
  return memoryFile(name, SEAL_ALL, (fd) => {
    for (let at = 0; at < content.length; ) at += writeSync(fd, content, at);
  });
}

function memoryFile(name: string, seals: number, fill: (fd: number) => void): number {
  const fd = Number(memfdCreate(name, MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (fd < 0) fail('memfd_create');
  try {
    fill(fd);
    if (fcntl(fd, F_ADD_SEALS, seals) !== 0) fail('fcntl(F_ADD_SEALS)');
    return fd;
  } catch (error) {
    closeSync(fd);
    throw error;
  }
}

/**
 * Takes the lock on `path`, creating the file. The lock ends with the process.
 * @returns the descriptor to keep, undefined where another process holds it
 */
export function lockFile(path: string): number | undefined {
  const fd = openSync(path, 'a', 0o600);
  if (flock(fd, LOCK_EX_NB) === 0) return fd;
  closeSync(fd);
  return undefined;
}

/**
 * Locks one byte of a file that is open for writing, for as long as this descriptor is open (fcntl(2), open file
 * description locks). @returns false where another descriptor holds it
 */
export function lockByte(fd: number, offset: number): boolean {
  if (fcntlLock(fd, F_OFD_SETLK, byteLock(F_WRLCK, offset)) === 0) return true;
  if (koffi.errno() !== EAGAIN) fail('fcntl(F_OFD_SETLK)');
  return false;
}

export function unlockByte(fd: number, offset: number): void {
  if (fcntlLock(fd, F_OFD_SETLK, byteLock(F_UNLCK, offset)) !== 0) fail('fcntl(F_OFD_SETLK)');
}

/** struct flock of 32 bytes: type, whence (SEEK_SET), start, length, pid (64-bit Linux). */
function byteLock(type: number, offset: number): Buffer {
  const lock = Buffer.alloc(32);
  lock.writeInt16LE(type, 0);
  lock.writeBigInt64LE(BigInt(offset), 8);
  lock.writeBigInt64LE(1n, 16);
  return lock;
}

/** No core dump of this process, no ptrace by others of its uid (prctl(2), PR_SET_DUMPABLE). */
export function forbidCoreDumps(): void {
  if (prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) !== 0) fail('prctl(PR_SET_DUMPABLE)');
}

/** struct msghdr of 56 bytes with one iovec and room for one descriptor (64-bit Linux). */
function messageHeader(payload: Uint8Array = Buffer.alloc(1)): { header: Buffer; control: Buffer } {
  const iov = Buffer.alloc(16);
  iov.writeBigUInt64LE(koffi.address(payload), 0);
  iov.writeBigUInt64LE(BigInt(payload.length), 8);
  const control = Buffer.alloc(24);
  control.writeBigUInt64LE(CMSG_LEN, 0);
  control.writeInt32LE(SOL_SOCKET, 8);
  control.writeInt32LE(SCM_RIGHTS, 12);
  const header = Buffer.alloc(56);
  header.writeBigUInt64LE(koffi.address(iov), 16);
  header.writeBigUInt64LE(1n, 24);
  header.writeBigUInt64LE(koffi.address(control), 32);
  // To the byte: in the padding behind the descriptor the kernel would put another.
  header.writeBigUInt64LE(CMSG_LEN, 40);
  // The addresses above are raw: what they point at must outlive the call.
  keepAlive.set(header, [payload, iov, control]);
  return { header, control };
}

const keepAlive = new WeakMap<Buffer, Uint8Array[]>();

function fail(call: string): never {
  throw new SystemCallError(call, koffi.errno());
}
