import { chmodSync, chownSync, lstatSync, rmSync } from 'node:fs';
import { createServer, type Server, Socket } from 'node:net';
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
  const server = createServer({ pauseOnConnect: true, allowHalfOpen: true }, onClient);
  // A connection that cannot be accepted is lost; the next one may be accepted again.
  await listen(option, server, entrance);
  server.on('error', () => undefined);
  return { close: () => void server.close() };
}

function listen(option: string, server: Server, entrance: Entrance): Promise<void> {
  const umask = process.umask(0o177);
  return new Promise<void>((resolve, reject) => {
    const fail = (error: NodeJS.ErrnoException): void =>
      reject(new DropinRefusal(`${option}: nobody can listen at ${nameOf(entrance)} (${error.code})`));
    server.once('error', fail);
    server.once('listening', () => {
      server.removeListener('error', fail);
      try {
        if (entrance.kind === 'path') own(entrance);
        resolve();
      } catch (error) {
        fail(error as NodeJS.ErrnoException);
      }
    });
    switch (entrance.kind) {
      case 'path':
        removeSocket(entrance.path);
        server.listen(entrance.path);
        return;
      case 'port':
        server.listen(entrance.port, entrance.host);
        return;
      case 'descriptor':
        server.listen({ fd: entrance.fd });
    }
  }).finally(() => process.umask(umask));
}

/** As swtpm does with what an earlier one left, but only where it is a socket. */
function removeSocket(path: string): void {
  if (lstatSync(path, { throwIfNoEntry: false })?.isSocket()) rmSync(path, { force: true });
}

function own({ path, mode, uid, gid }: Extract<Entrance, { kind: 'path' }>): void {
  if (uid !== undefined || gid !== undefined) {
    // 4294967295, which is -1, leaves it as it is (chown(2)).
    chownSync(path, uid ?? 0xffff_ffff, gid ?? 0xffff_ffff);
  }
  chmodSync(path, mode);
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
