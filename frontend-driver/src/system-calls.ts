import { closeSync, ftruncateSync } from 'node:fs';
import { createRequire } from 'node:module';
import { FrontendError } from './error.js';

type Koffi = typeof import('koffi');

const SOL_SOCKET = 1;
const AF_UNIX = 1;
const SOCK_STREAM = 1;
const SOCK_CLOEXEC = 0o2000000;
const SCM_RIGHTS = 1;
const MSG_DONTWAIT = 0x40;
const MSG_NOSIGNAL = 0x4000;
const MFD_CLOEXEC = 1;
const MFD_ALLOW_SEALING = 2;
const F_ADD_SEALS = 1033;
/** F_SEAL_SEAL, F_SEAL_SHRINK and F_SEAL_GROW. */
const SEALS_OF_SIZE = 0x1 | 0x2 | 0x4;
const PROT_READ_WRITE = 1 | 2;
const MAP_SHARED = 0x01;
const MAP_OWN = 0x02 | 0x20;
const MAP_FIXED = 0x10;
const MAP_FAILED = 0xffffffffffffffffn;

let bound: ReturnType<typeof bind> | undefined;

/** Bound when they are first needed: who uses sockets alone does not load the addon. */
export function systemCalls(): ReturnType<typeof bind> {
  bound ??= bind();
  return bound;
}

function bind() {
  let koffi: Koffi;
  try {
    koffi = createRequire(import.meta.url)('koffi') as Koffi;
  } catch (cause) {
    throw new FrontendError('usage', 'the npm package koffi is not installed; a ring needs it', cause);
  }
  const libc = koffi.load('libc.so.6');
  return {
    koffi,
    memfdCreate: libc.func('int memfd_create(const char *name, unsigned int flags)'),
    fcntl: libc.func('int fcntl(int fd, int command, long argument)'),
    mmap: libc.func(
      'uint64_t mmap(uint64_t at, size_t length, int protection, int flags, int fd, long offset)',
    ),
    socketpair: libc.func('int socketpair(int domain, int type, int protocol, _Out_ int32_t *pair)'),
    sendmsg: libc.func('long sendmsg(int fd, void *header, int flags)'),
    send: libc.func('long send(int fd, void *buffer, size_t length, int flags)'),
    schedYield: libc.func('int sched_yield(void)'),
    ioctl: libc.func('int ioctl(int fd, unsigned long request, void *argument)'),
    poll: libc.func('int poll(void *descriptors, unsigned long count, int timeout)'),
  };
}

/** Memory behind a descriptor whose size nobody can change. The caller closes it. @throws FrontendError `internal` */
export function sealedMemory(name: string, bytes: number): number {
  const { memfdCreate, fcntl } = systemCalls();
  const fd = Number(memfdCreate(name, MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (fd < 0) fail('memfd_create');
  try {
    ftruncateSync(fd, bytes);
    if (Number(fcntl(fd, F_ADD_SEALS, SEALS_OF_SIZE)) !== 0) fail('fcntl(F_ADD_SEALS)');
    return fd;
  } catch (error) {
    closeSync(fd);
    throw error;
  }
}

/** Maps memory for good, or in the place of what is mapped at an address. @throws FrontendError `internal` */
export function mapShared(fd: number, bytes: number, at?: bigint): bigint {
  return map(at, MAP_SHARED, fd, bytes);
}

/** In the place of what is mapped there: memory of this process alone. */
export function mapOwn(bytes: number, at: bigint): void {
  map(at, MAP_OWN, -1, bytes);
}

function map(at: bigint | undefined, flags: number, fd: number, bytes: number): bigint {
  const fixed = at === undefined ? 0 : MAP_FIXED;
  const address = BigInt(systemCalls().mmap(at ?? 0n, bytes, PROT_READ_WRITE, flags | fixed, fd, 0));
  if (address === MAP_FAILED) fail('mmap');
  return address;
}

/** The memory at an address, valid as long as it is mapped. */
export function viewOf(address: bigint, bytes: number): Buffer {
  return Buffer.from(systemCalls().koffi.view(address, bytes));
}

/** Two connected unix stream sockets. The caller closes them. @throws FrontendError `internal` */
export function socketPair(): [number, number] {
  const pair = [0, 0];
  if (Number(systemCalls().socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair)) !== 0) {
    fail('socketpair');
  }
  return [pair[0] ?? -1, pair[1] ?? -1];
}

/** Sends what fits now. @returns the number of bytes, 0 where none */
export function sendNow(fd: number, bytes: Buffer): number {
  return Math.max(0, Number(systemCalls().send(fd, bytes, bytes.length, MSG_DONTWAIT | MSG_NOSIGNAL)));
}

/** Sends a message with copies of descriptors in one piece (unix(7), SCM_RIGHTS). @throws FrontendError `closed` */
export function sendWithDescriptors(fd: number, message: Buffer, descriptors: readonly number[]): void {
  const { koffi, sendmsg } = systemCalls();
  // struct cmsghdr, then the descriptors, padded to eight bytes; struct iovec; struct msghdr.
  const control = Buffer.alloc(16 + 8 * Math.ceil(descriptors.length / 2));
  control.writeBigUInt64LE(BigInt(16 + 4 * descriptors.length), 0);
  control.writeInt32LE(SOL_SOCKET, 8);
  control.writeInt32LE(SCM_RIGHTS, 12);
  for (const [index, descriptor] of descriptors.entries()) control.writeInt32LE(descriptor, 16 + 4 * index);
  const iov = Buffer.alloc(16);
  iov.writeBigUInt64LE(BigInt(koffi.address(message)), 0);
  iov.writeBigUInt64LE(BigInt(message.length), 8);
  const header = Buffer.alloc(56);
  header.writeBigUInt64LE(BigInt(koffi.address(iov)), 16);
  header.writeBigUInt64LE(1n, 24);
  header.writeBigUInt64LE(BigInt(koffi.address(control)), 32);
  header.writeBigUInt64LE(BigInt(control.length), 40);
  const sent = Number(sendmsg(fd, header, MSG_DONTWAIT | MSG_NOSIGNAL));
  if (sent !== message.length) {
    throw new FrontendError('closed', `the ring cannot be passed to the vTPM (errno ${koffi.errno()})`);
  }
}

function fail(call: string): never {
  throw new FrontendError('internal', `${call} failed with errno ${systemCalls().koffi.errno()}`);
}
