import { type FileHandle, open } from 'node:fs/promises';
import { concat, wipe } from '../bytes.js';
import { HEADER, type Transport, transportError } from './transport.js';

/** What the kernel's driver can take or give at once (TPM_BUFSIZE). */
const BUFFER = 4096;

/**
 * A TPM behind a character device. Prefer `/dev/tpmrm0`, the kernel's resource manager: `/dev/tpm0` has one user at a
 * time and keeps what a killed one left loaded. Reads and writes go through the thread pool of `fs`: a TPM may take
 * seconds, and the event loop does not wait for it.
 * @throws TpmError `transport` where the device cannot be opened
 */
export async function openDevice(path: string): Promise<Transport> {
  try {
    return new DeviceTransport(path, await open(path, 'r+'));
  } catch (cause) {
    throw transportError(`${path} cannot be opened: ${explain(cause)}`, cause);
  }
}

function explain(cause: unknown): string {
  const { code, message } = cause as NodeJS.ErrnoException;
  if (code === 'ENOENT') return 'there is no such device';
  if (code === 'EACCES') return 'permission denied; its group is usually "tss"';
  if (code === 'EBUSY') return 'another program is using it; use /dev/tpmrm0';
  return message;
}

class DeviceTransport implements Transport {
  #failure: Error | undefined;
  #busy = false;
  readonly #buffer = Buffer.alloc(BUFFER);
  constructor(
    private readonly path: string,
    private readonly file: FileHandle,
  ) {}

  async transmit(command: Uint8Array): Promise<Buffer> {
    if (this.#failure !== undefined) throw transportError(`${this.path} failed before`, this.#failure);
    if (this.#busy) throw transportError(`${this.path}: a command is already under way`);
    this.#busy = true;
    try {
      // The driver takes a command in one write and gives the answer in one read; it has no position.
      const { bytesWritten } = await this.file.write(command, 0, command.length, null);
      if (bytesWritten !== command.length)
        throw new Error(`${bytesWritten} of ${command.length} bytes written`);
      const { bytesRead } = await this.file.read(this.#buffer, 0, BUFFER, null);
      if (bytesRead < HEADER) throw new Error(`an answer of ${bytesRead} bytes`);
      return concat(this.#buffer.subarray(0, bytesRead));
    } catch (cause) {
      this.#failure = cause as Error;
      throw transportError(`${this.path}: ${(cause as Error).message}`, cause);
    } finally {
      wipe(this.#buffer);
      this.#busy = false;
    }
  }

  async close(): Promise<void> {
    this.#failure ??= new Error('closed');
    await this.file.close();
  }
}
