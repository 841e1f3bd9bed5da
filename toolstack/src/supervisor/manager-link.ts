import { Socket } from 'node:net';
import { setTimeout as delay } from 'node:timers/promises';
import { ToolstackError } from '../error.js';

const FIRST_RETRY_MS = 50;
const LONGEST_RETRY_MS = 200;

/**
 * Connects to the manager's worker socket for a worker to inherit. Not a byte is read here: the manager speaks first
 * (HTTP/2, RFC 9113 section 3.4) and what it says is for the worker.
 * @throws ToolstackError `manager-unreachable`
 */
export function connectWorkerLink(path: string): Promise<Socket> {
  return new Promise((resolve, reject) => {
    const socket = new Socket();
    // Before connect: a socket that is paused explicitly does not start to read when it is connected.
    socket.pause();
    socket.once('error', (cause) => {
      socket.destroy();
      reject(
        new ToolstackError(
          'manager-unreachable',
          isAbsent(cause)
            ? 'the manager is not running; start it: vtpmctl up'
            : `the manager cannot be reached at ${path} (${cause.message})`,
          { cause },
        ),
      );
    });
    socket.connect(path, () => {
      socket.removeAllListeners('error');
      socket.on('error', () => undefined);
      resolve(socket);
    });
  });
}

function isAbsent({ code }: NodeJS.ErrnoException): boolean {
  return code === 'ENOENT' || code === 'ECONNREFUSED';
}

/** Tries until it works. @returns undefined where `isWanted` turned false */
export async function connectWorkerLinkAgain(
  path: string,
  isWanted: () => boolean,
): Promise<Socket | undefined> {
  for (let wait = FIRST_RETRY_MS; isWanted(); wait = Math.min(wait * 1.5, LONGEST_RETRY_MS)) {
    try {
      return await connectWorkerLink(path);
    } catch {
      // For as long as the manager is away; the guest's TPM waits.
      await delay(wait);
    }
  }
  return undefined;
}
