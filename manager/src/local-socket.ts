import { chmodSync, lstatSync, rmSync } from 'node:fs';
import { createServer, type Server, type Socket } from 'node:net';
import { dirname } from 'node:path';
import {
  checkSocketPath,
  type Logger,
  type PeerCredentials,
  peerCredentials,
  privateDirectory,
  socketFd,
  takePassedListener,
} from 'vtpm-common';
import { ManagerError } from './error.js';

/** A unix socket of the manager: mode 0600, and only root and the manager's own uid get through. */
export interface LocalListener {
  /** Takes no more connections and removes the socket. Connections that are open stay open. */
  close(): Promise<void>;
}

/**
 * The caller holds the installation's lock: a socket that lies at `path` is a dead manager's and is replaced, unless the
 * service manager listens on it and passed it on.
 * The kernel's word on who connected (SO_PEERCRED) is checked although the mode already says it: a descriptor can be
 * passed on, and a directory be opened by mistake.
 */
export async function listenLocally(
  path: string,
  log: Logger,
  onConnection: (socket: Socket, peer: PeerCredentials) => void,
): Promise<LocalListener> {
  checkSocketPath(path);
  privateDirectory(dirname(path));
  const passed = takePassedListener(path);
  if (passed === undefined) removeStaleSocket(path);
  const server = createServer({ allowHalfOpen: false }, (socket) => {
    // Later owners add their own handler; without one a reset would end the process.
    socket.on('error', () => undefined);
    const peer = admit(socket, log, path);
    if (peer) onConnection(socket, peer);
    else socket.destroy();
  });
  await listening(server, path, passed);
  // The next connection may be accepted again; without a handler this one would end the process.
  server.on('error', (error) => log.warn({ socket: path, reason: error.message }, 'a connection was lost'));
  if (passed === undefined) chmodSync(path, 0o600);
  return { close: () => closed(server) };
}

function admit(socket: Socket, log: Logger, path: string): PeerCredentials | undefined {
  try {
    const peer = peerCredentials(socketFd(socket));
    if (peer.uid === 0 || peer.uid === process.getuid?.()) return peer;
    log.warn({ uid: peer.uid, pid: peer.pid, socket: path }, 'connection of another user refused');
  } catch (error) {
    log.warn({ socket: path, error: (error as Error).message }, 'connection without credentials refused');
  }
  return undefined;
}

function removeStaleSocket(path: string): void {
  const found = lstatSync(path, { throwIfNoEntry: false });
  if (!found) return;
  if (!found.isSocket()) {
    throw new ManagerError('bad-request', `${path} exists and is not a socket; move it away`);
  }
  rmSync(path);
}

function listening(server: Server, path: string, passed: number | undefined): Promise<void> {
  return new Promise((resolve, reject) => {
    server.once('error', (cause) => {
      reject(new ManagerError('internal', `cannot listen on ${path}: ${cause.message}`, { cause }));
    });
    server.listen(passed === undefined ? { path } : { fd: passed }, resolve);
  });
}

/** net.Server removes its socket when it closes; waiting for open connections is not this function's job. */
function closed(server: Server): Promise<void> {
  return new Promise((resolve) => {
    server.close();
    setImmediate(resolve);
  });
}
