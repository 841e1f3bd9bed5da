import { connect, type Socket } from 'node:net';
import { FrontendError } from './error.js';

export interface ConnectOptions {
  /** A door of a vTPM: `tpm.sock`, or `ring.sock` for a ring. */
  readonly path: string;
  /** Milliseconds to wait for the connection; 5000 unless given. */
  readonly timeout?: number;
}

/** @throws FrontendError `unreachable`, with what stands in the way */
export async function connectTo({ path, timeout = 5000 }: ConnectOptions): Promise<Socket> {
  const socket = connect({ path });
  const giveUp = setTimeout(
    () => socket.destroy(Object.assign(new Error('no answer'), { code: 'ETIMEDOUT' })),
    timeout,
  );
  try {
    await new Promise<void>((resolve, reject) => {
      socket.once('connect', () => {
        socket.off('error', reject);
        resolve();
      });
      socket.once('error', reject);
    });
    return socket;
  } catch (cause) {
    throw new FrontendError('unreachable', whyUnreachable(path, cause, timeout), cause);
  } finally {
    clearTimeout(giveUp);
  }
}

function whyUnreachable(path: string, cause: unknown, timeout: number): string {
  switch ((cause as NodeJS.ErrnoException).code) {
    case 'ENOENT':
      return `there is no socket ${path}: the vTPM is not running, or its name is another`;
    case 'ECONNREFUSED':
      return `nobody answers at ${path}: the vTPM is not running`;
    case 'EACCES':
    case 'EPERM':
      return `${path} may not be opened by this user`;
    case 'ETIMEDOUT':
      return `no connection to ${path} within ${timeout} ms`;
    default:
      return `${path} cannot be reached: ${cause instanceof Error ? cause.message : String(cause)}`;
  }
}
