import { once } from 'node:events';
import type { AddressInfo, Server } from 'node:net';
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
    const { code } = error as NodeJS.ErrnoException;
    if (code === 'EADDRINUSE') return undefined;
    if (code !== 'EAFNOSUPPORT' && code !== 'EADDRNOTAVAIL') throw error;
    throw new ToolstackError(
      'internal',
      'this supervisor may not use the network, which the door "mssim" needs: the unit of its service forbids it',
      { cause: error },
    );
  }
  return (server.address() as AddressInfo).port;
}
