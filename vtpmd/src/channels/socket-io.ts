import { koffi } from 'vtpm-common/libc';
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

/** Writes what fits. @returns the number of bytes, 0 where none fits or the write failed */
export function sendNow(fd: number, bytes: Buffer): number {
  const sent = Number(send(fd, bytes, bytes.length, MSG_DONTWAIT | MSG_NOSIGNAL));
  return Math.max(sent, 0);
}

/** Waits for something to read. @returns false after the timeout, and where the descriptor has an error */
export function waitReadable(fd: number, microseconds: number): boolean {
  fields.writeInt32LE(fd, 0);
  fields.writeInt16LE(POLLIN, 4);
  fields.writeInt16LE(0, 6);
  fields.writeUInt32LE(0, 8);
  fields.writeUInt32LE(0, 12);
  fields.writeUInt32LE(microseconds * 1000, 16);
  fields.writeUInt32LE(0, 20);
  return Number(ppoll(memory, 1, memory + 8n, null)) === 1 && (fields.readInt16LE(6) & POLLIN) !== 0;
}
