import { koffi, prctl, SystemCallError } from '../libc.js';

const libc = koffi.load('libc.so.6');
const syscall = libc.func('long syscall(long number, long operation, long flags, void *argument)');

const PR_SET_NO_NEW_PRIVS = 38;
const SECCOMP_SET_MODE_FILTER = 1;
/** All threads, those of V8 and libuv too: one without the filter would be the way around it. */
const SECCOMP_FILTER_FLAG_TSYNC = 1;
const SECCOMP: Readonly<Record<string, number>> = { x64: 317, arm64: 277 };

/**
 * Puts a filter (filter.ts) on every thread of this process, for good: no call takes a filter away (seccomp(2)).
 * @throws SystemCallError where the kernel has no filters, or a thread could not be given it
 */
export function installFilter(program: Buffer): void {
  if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) !== 0) {
    throw new SystemCallError('prctl(PR_SET_NO_NEW_PRIVS)', koffi.errno());
  }
  // struct sock_fprog: u16 length in instructions, padding, pointer.
  const description = Buffer.alloc(16);
  description.writeUInt16LE(program.length / 8, 0);
  description.writeBigUInt64LE(koffi.address(program), 8);
  const number = SECCOMP[process.arch] ?? -1;
  const result = Number(syscall(number, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, description));
  if (result === -1) throw new SystemCallError('seccomp(SET_MODE_FILTER)', koffi.errno());
  // A thread's id: it has a filter of its own that is not an ancestor of ours.
  if (result > 0) throw new Error(`seccomp: thread ${result} cannot be given the filter`);
}
