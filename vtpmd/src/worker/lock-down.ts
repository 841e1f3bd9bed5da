import { randomFill } from 'node:crypto';
import { seccompFilter } from 'vtpm-common/seccomp/filter';
import { installFilter } from 'vtpm-common/seccomp/install';
import { VtpmdError } from '../error.js';

/**
 * Gives up for good what only starting needed: to open files, to make sockets, processes and threads, to execute. From
 * here on the worker has its memory and the descriptors that it was given or is passed. Call it when everything is
 * loaded and before there is an identity: no byte of a guest is ever seen with more.
 * @throws VtpmdError `internal` where the kernel does not take the filter
 */
export function lockDown(): void {
  // libuv makes its threads with the first work that it gives them, and they could not be made later.
  randomFill(Buffer.alloc(1), () => undefined);
  try {
    installFilter(seccompFilter('serve'));
  } catch (cause) {
    throw new VtpmdError('internal', `the worker cannot lock itself down: ${(cause as Error).message}`, {
      cause,
    });
  }
}
