import { fcntl, koffi, socketOption } from 'vtpm-common/libc';
import { allocate, viewOf } from '../engine/libtpms.js';

const libc = koffi.load('libc.so.6');
const recv = libc.func('long recv(int fd, void *buffer, size_t length, int flags)');
const send = libc.func('long send(int fd, void *buffer, size_t length, int flags)');
const ppoll = libc.func('int ppoll(void *descriptors, unsigned long count, void *timeout, void *mask)');

const MSG_DONTWAIT = 0x40;
const MSG_NOSIGNAL = 0x4000;
const POLLIN = 1;

// One struct pollfd (8 bytes) and one struct timespec (16 bytes); addresses are cheaper to pass than buffers.
const memory = allocate(24);
const fields = viewOf(memory, 24);

/** Reads what is there. @returns the number of bytes; 0 at the end, -1 where nothing is there or the read failed */
export function receiveNow(fd: number, buffer: Buffer): number {
  return Number(recv(fd, buffer, buffer.length, MSG_DONTWAIT));
}

/** What is thrown away at most. */
const MOST_LEFT_BYTES = 1024 * 1024;

/**
 * Throws away what a client sent behind its last request, so that it gets its answer and not ECONNRESET.
 * @param scratch is written to
 */
export function discardLeft(fd: number, scratch: Buffer): void {
  for (let left = 0; left < MOST_LEFT_BYTES; ) {
    const length = receiveNow(fd, scratch);
    if (length <= 0) break;
    left += length;
  }
}

/** Writes what fits. @returns the number of bytes, 0 where none fits or the write failed */
export function sendNow(fd: number, bytes: Buffer): number {
  const sent = Number(send(fd, bytes, bytes.length, MSG_DONTWAIT | MSG_NOSIGNAL));
  return Math.max(sent, 0);
}

/** Waits for something to read. @returns false after the timeout, and where the descriptor has an error */
export function waitReadable(fd: number, microseconds: number): boolean {
  return (poll(fd, POLLIN, microseconds) & POLLIN) !== 0;
}

const write = libc.func('long write(int fd, void *buffer, size_t length)');
const read = libc.func('long read(int fd, void *buffer, size_t length)');
const splice = libc.func(
  'long splice(int from, void *fromOffset, int to, void *toOffset, size_t length, uint32_t flags)',
);
const setsockopt = libc.func('int setsockopt(int fd, int level, int name, void *value, uint32_t length)');

const MSG_PEEK = 2;
const POLLOUT = 4;
const POLLERR = 8;
const POLLHUP = 0x10;
const POLLRDHUP = 0x2000;
const SOL_SOCKET = 1;
const SO_PEEK_OFF = 42;
const SPLICE_F_MOVE_NONBLOCK = 1 | 2;
const EAGAIN = 11;
const F_SETFL = 4;
const O_NONBLOCK = 0o4000;

const offsetValue = Buffer.alloc(4);

/**
 * Reads from the socket's peek offset on and leaves everything there; the offset moves behind what was read, and back by
 * what is received later (socket(7), SO_PEEK_OFF). It belongs to the socket and so outlives the process.
 * @returns the number of bytes; 0 at the end, -1 where nothing is there, -2 where the socket is of no use any more
 */
export function peekNow(fd: number, buffer: Buffer): number {
  const length = Number(recv(fd, buffer, buffer.length, MSG_DONTWAIT | MSG_PEEK));
  if (length >= 0) return length;
  return koffi.errno() === EAGAIN ? -1 : -2;
}

export function setPeekOffset(fd: number, offset: number): void {
  offsetValue.writeInt32LE(offset, 0);
  setsockopt(fd, SOL_SOCKET, SO_PEEK_OFF, offsetValue, 4);
}

/** -1 where none was ever set. */
export function peekOffset(fd: number): number {
  return socketOption(fd, SO_PEEK_OFF) ?? -1;
}

/** @returns the number of bytes written, -1 where none */
export function writeNow(fd: number, bytes: Buffer): number {
  return Number(write(fd, bytes, bytes.length));
}

/** Of the open file, whoever else has it. */
export function setNonBlocking(fd: number): void {
  fcntl(fd, F_SETFL, O_NONBLOCK);
}

/** Moves what is in a pipe to a socket. @returns the number of bytes, 0 for an empty pipe, -1 where it cannot be moved now or ever */
export function spliceNow(pipe: number, fd: number, length: number): number {
  return Number(splice(pipe, null, fd, null, length, SPLICE_F_MOVE_NONBLOCK));
}

export function pipeHolds(pipe: number): boolean {
  return (pollNow(pipe, POLLIN) & POLLIN) !== 0;
}

/** @returns a copy of the first bytes */
export function drainPipe(pipe: number): Buffer {
  let first: Buffer | undefined;
  while (pipeHolds(pipe)) {
    const length = Number(read(pipe, drainBuffer, drainBuffer.length));
    if (length <= 0) break;
    first ??= Buffer.from(drainBuffer.subarray(0, Math.min(length, 8)));
  }
  return first ?? Buffer.alloc(0);
}

const drainBuffer = Buffer.alloc(4096);

/** The peer is gone: what it sent can still be read, but nothing can be answered. */
export function hasHungUp(fd: number): boolean {
  return (pollNow(fd, 0) & (POLLHUP | POLLERR)) !== 0;
}

/** The peer sends no more. */
export function hasEnded(fd: number): boolean {
  return (pollNow(fd, POLLRDHUP) & (POLLRDHUP | POLLHUP | POLLERR)) !== 0;
}

/** At least three quarters of the send buffer are free. */
export function isWritable(fd: number): boolean {
  return (pollNow(fd, POLLOUT) & POLLOUT) !== 0;
}

export function waitWritable(fd: number, microseconds: number): void {
  poll(fd, POLLOUT, microseconds);
}

const schedYield = libc.func('int sched_yield(void)');

/** Lets whoever else wants this processor have it (sched_yield(2)). */
export function yieldProcessor(): void {
  schedYield();
}

function pollNow(fd: number, events: number): number {
  return poll(fd, events, 0);
}

function poll(fd: number, events: number, microseconds: number): number {
  fields.writeInt32LE(fd, 0);
  fields.writeInt16LE(events, 4);
  fields.writeInt16LE(0, 6);
  fields.writeUInt32LE(0, 8);
  fields.writeUInt32LE(0, 12);
  fields.writeUInt32LE(microseconds * 1000, 16);
  fields.writeUInt32LE(0, 20);
  ppoll(memory, 1, memory + 8n, null);
  return fields.readUInt16LE(6);
}
