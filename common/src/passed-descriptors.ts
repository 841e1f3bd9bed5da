import { close } from 'node:fs';
import { socketOption } from './libc.js';

const SO_TYPE = 3;
const SO_ACCEPTCONN = 30;
const SO_DOMAIN = 39;
const AF_UNIX = 1;
const SOCK_STREAM = 1;

/**
 * Whether a descriptor that somebody passed is a socket. Nothing is asked of the file: fstat(2) in another program's file
 * system takes as long as that program likes.
 */
export function isSocket(fd: number): boolean {
  return socketOption(fd, SO_TYPE) !== undefined;
}

/** As `isSocket`: a unix stream socket that is not listening. */
export function isUnixStream(fd: number): boolean {
  return (
    socketOption(fd, SO_DOMAIN) === AF_UNIX &&
    socketOption(fd, SO_TYPE) === SOCK_STREAM &&
    socketOption(fd, SO_ACCEPTCONN) === 0
  );
}

const closing: number[] = [];

/**
 * Not in this thread: closing a file of another program's file system takes as long as that program likes. One after the
 * other, so that at most one thread of the pool waits.
 */
export function closeUnknown(fd: number): void {
  closing.push(fd);
  if (closing.length === 1) closeNext(fd);
}

function closeNext(fd: number): void {
  close(fd, () => {
    closing.shift();
    const [next] = closing;
    if (next !== undefined) closeNext(next);
  });
}

/** Some are being closed: better take no more meanwhile. */
export function isClosing(): boolean {
  return closing.length > 0;
}
