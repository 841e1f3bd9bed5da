import { randomInt } from 'node:crypto';
import { once } from 'node:events';
import { createServer, type ListenOptions } from 'node:net';

/** Below those that the kernel gives to whoever asks for any, connections too: nobody gets one between the look and its use. */
const FIRST = 20_000;
const BEHIND = 32_768;

/** A port that is free at all of these addresses, and that no other test of this machine is given while this process lives. */
export async function freePort(...hosts: readonly string[]): Promise<number> {
  for (;;) {
    const port = randomInt(FIRST, BEHIND);
    if (!(await isReserved(port))) continue;
    const isFree = await Promise.all(hosts.map((host) => isFreeAt(host, port)));
    if (!isFree.includes(false)) return port;
  }
}

/** By the name of a socket that has no file (unix(7), abstract): it goes with the process. */
async function isReserved(port: number): Promise<boolean> {
  return (await listens({ path: `\0vtpm-test-port-${port}` }, true)) === 'listens';
}

async function isFreeAt(host: string, port: number): Promise<boolean> {
  return (await listens({ host, port }, false)) !== 'EADDRINUSE';
}

async function listens(at: ListenOptions, stays: boolean): Promise<string> {
  const server = createServer().listen(at).unref();
  try {
    await once(server, 'listening');
  } catch (error) {
    return String((error as NodeJS.ErrnoException).code);
  }
  if (!stays) {
    server.close();
    await once(server, 'close');
  }
  return 'listens';
}
