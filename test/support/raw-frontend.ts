import { once } from 'node:events';
import { closeSync, ftruncateSync } from 'node:fs';
import { createConnection, type Socket } from 'node:net';
import { fcntl, socketFd, socketPair } from 'vtpm-common/libc';
import { mapShared, sendWithDescriptors, systemCalls, viewOf } from 'vtpm-frontend-driver/system-calls';

export const SETUP = 'state=3\nfeature-protocol-v2=1\n\n';
export const SEAL = { SEAL: 1, SHRINK: 2, GROW: 4, WRITE: 8 } as const;
const F_ADD_SEALS = 1033;
const MFD_ALLOW_SEALING = 2;

/** Memory as a frontend that is up to something makes it. The caller closes it. */
export function memoryOf(bytes: number, seals: number): number {
  const fd = Number(systemCalls().memfdCreate('hostile', MFD_ALLOW_SEALING));
  ftruncateSync(fd, bytes);
  if (seals !== 0 && fcntl(fd, F_ADD_SEALS, seals) !== 0) throw new Error('the seals do not hold');
  return fd;
}

/** A connection at a ring door that sends what it likes. */
export class RawFrontend {
  readonly socket: Socket;
  readonly ended: Promise<void>;
  /** All that the backend said. */
  said = '';

  private constructor(socket: Socket) {
    this.socket = socket;
    socket.setEncoding('latin1').on('data', (text: string) => {
      this.said += text;
    });
    socket.on('error', () => {});
    this.ended = new Promise((resolve) => socket.once('close', () => resolve()));
  }

  static async connect(path: string): Promise<RawFrontend> {
    const socket = createConnection(path);
    await once(socket, 'connect');
    return new RawFrontend(socket);
  }

  send(message: string, descriptors: readonly number[]): void {
    sendWithDescriptors(socketFd(this.socket), Buffer.from(message), descriptors);
  }

  /** Sends a proper ring of that memory. @returns its bytes, and this end of its event channel */
  open(pages = 2): { readonly bytes: Buffer; readonly event: number } {
    const memory = memoryOf(pages * 4096, SEAL.SHRINK);
    const [here, there] = socketPair();
    this.send(SETUP, [memory, there]);
    const bytes = viewOf(mapShared(memory, pages * 4096), pages * 4096);
    for (const fd of [memory, there]) closeSync(fd);
    return { bytes, event: here };
  }

  close(): void {
    this.socket.destroy();
  }
}
