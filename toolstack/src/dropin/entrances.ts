import { randomBytes } from 'node:crypto';
import { chmodSync, chownSync, lstatSync, renameSync, rmSync } from 'node:fs';
import { createServer, type Server, Socket } from 'node:net';
import { dirname, join } from 'node:path';
import { MAX_SOCKET_PATH_BYTES } from 'vtpm-common/paths';
import { DropinRefusal } from './refusal.js';
import type { Entrance } from './swtpm-arguments.js';

/** Takes a client; the descriptor under `socket` is read by nobody here. */
export type OnClient = (socket: Socket) => void;

export interface OpenEntrance {
  /** Also removes the socket that was made. */
  close(): void;
}

/**
 * Opens a socket of the caller's choice, or takes one that was inherited. Clients wait in it until they are served.
 * @param option for messages @throws DropinRefusal
 */
export async function openEntrance(
  option: string,
  entrance: Entrance,
  onClient: OnClient,
): Promise<OpenEntrance> {
  if (entrance.kind === 'descriptor' && entrance.isConnected) {
    onClient(inherited(option, entrance.fd));
    return { close: () => undefined };
  }
  if (entrance.kind === 'path') checkLength(option, entrance.path);
  const server = createServer({ pauseOnConnect: true, allowHalfOpen: true }, onClient);
  // A connection that cannot be accepted is lost; the next one may be accepted again.
  await listen(option, server, entrance);
  server.on('error', () => undefined);
  return {
    close: () => {
      server.close();
      if (entrance.kind === 'path') rmSync(entrance.path, { force: true });
    },
  };
}

function listen(option: string, server: Server, entrance: Entrance): Promise<void> {
  const umask = process.umask(0o177);
  const hidden = entrance.kind === 'path' ? hiddenName(entrance.path) : '';
  return new Promise<void>((resolve, reject) => {
    const fail = (error: NodeJS.ErrnoException): void =>
      reject(new DropinRefusal(`${option}: nobody can listen at ${nameOf(entrance)} (${error.code})`));
    server.once('error', fail);
    server.once('listening', () => {
      server.removeListener('error', fail);
      try {
        if (entrance.kind === 'path') show(hidden, entrance);
        resolve();
      } catch (error) {
        server.close();
        fail(error as NodeJS.ErrnoException);
      }
    });
    switch (entrance.kind) {
      case 'path':
        server.listen(hidden);
        return;
      case 'port':
        server.listen(entrance.port, entrance.host);
        return;
      case 'descriptor':
        server.listen({ fd: entrance.fd });
    }
  }).finally(() => process.umask(umask));
}

/** @throws DropinRefusal */
function checkLength(option: string, path: string): void {
  const length = Buffer.byteLength(path);
  if (length <= MAX_SOCKET_PATH_BYTES) return;
  throw new DropinRefusal(
    `${option}: ${path} has ${length} bytes, a unix socket takes ${MAX_SOCKET_PATH_BYTES}; choose a shorter path`,
  );
}

/** In the same directory, and no longer than most names. */
function hiddenName(path: string): string {
  return join(dirname(path), `.${randomBytes(2).toString('hex')}`);
}

/**
 * Whoever waits for the socket finds one that is listened at, and is theirs. As swtpm does, it takes the place of what an
 * earlier one left, but only where that is a socket.
 */
function show(hidden: string, { path, mode, uid, gid }: Extract<Entrance, { kind: 'path' }>): void {
  if (uid !== undefined || gid !== undefined) {
    // 4294967295, which is -1, leaves it as it is (chown(2)).
    chownSync(hidden, uid ?? 0xffff_ffff, gid ?? 0xffff_ffff);
  }
  chmodSync(hidden, mode);
  const there = lstatSync(path, { throwIfNoEntry: false });
  if (there && !there.isSocket()) throw Object.assign(new Error(path), { code: 'EADDRINUSE' });
  renameSync(hidden, path);
}

function inherited(option: string, fd: number): Socket {
  try {
    return new Socket({ fd, readable: false, writable: true, allowHalfOpen: true });
  } catch {
    throw new DropinRefusal(`${option}: descriptor ${fd} was not passed on, or is no socket`);
  }
}

function nameOf(entrance: Entrance): string {
  if (entrance.kind === 'path') return entrance.path;
  return entrance.kind === 'port' ? `${entrance.host}:${entrance.port}` : `descriptor ${entrance.fd}`;
}
