import { once } from 'node:events';
import { readFileSync } from 'node:fs';
import type { AddressInfo, Server, Socket } from 'node:net';
import { ToolstackError } from '../error.js';

const HOST = '127.0.0.1';
/** Another program may take the second port first. */
const PAIR_TRIES = 64;
const HIGHEST_PORT = 65_535;

/**
 * Listens on two consecutive ports of the loopback interface, whose second one clients of the TCG simulator take to be the
 * first plus 1. @throws ToolstackError `internal` where no two are free
 */
export async function listenOnPair(first: Server, second: Server): Promise<void> {
  for (let tries = 0; tries < PAIR_TRIES; tries++) {
    const port = await listen(first, 0);
    if (port !== undefined && port < HIGHEST_PORT && (await listen(second, port + 1)) !== undefined) return;
    first.close();
    await once(first, 'close');
  }
  throw new ToolstackError('internal', `there are no two consecutive free ports at ${HOST}`);
}

/** @returns the port, undefined where it is taken */
async function listen(server: Server, port: number): Promise<number | undefined> {
  try {
    server.listen(port, HOST);
    await once(server, 'listening');
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'EADDRINUSE') return undefined;
    throw error;
  }
  return (server.address() as AddressInfo).port;
}

/**
 * Of which user the other end of a connection on this host is. Unix sockets have permission bits for that, ports do not.
 * @returns undefined where the kernel's table does not have it (proc(5), /proc/net/tcp)
 */
export function peerUid({
  localPort,
  remotePort,
}: Pick<Socket, 'localPort' | 'remotePort'>): number | undefined {
  if (localPort === undefined || remotePort === undefined) return undefined;
  // Addresses are in the host's order of bytes.
  const address = (port: number): string => `0100007F:${port.toString(16).toUpperCase().padStart(4, '0')}`;
  const [near, far] = [address(remotePort), address(localPort)];
  for (const line of readFileSync('/proc/net/tcp', 'utf8').split('\n')) {
    const [, local, remote, , , , , uid] = line.trim().split(/\s+/);
    if (local === near && remote === far) return Number(uid);
  }
  return undefined;
}
