import { type FileHandle, open } from 'node:fs/promises';
import { type DeviceOptions, DeviceTransport, explain } from './device-transport.js';
import { type Transport, transportError } from './transport.js';

/**
 * A TPM behind a character device. Prefer `/dev/tpmrm0`, the kernel's resource manager: `/dev/tpm0` has one user at a
 * time and keeps what a killed one left loaded. Reads and writes go through the thread pool of `fs`: a TPM may take
 * seconds, and the event loop does not wait for it. One thread of the pool (UV_THREADPOOL_SIZE, 4) is in use while a
 * command is under way.
 *
 * No call of the kernel can be taken back. After a deadline, or a `close` with a command under way, the transport is over
 * for its user at once, but the thread and the descriptor stay in use until the driver returns from that call; then the
 * descriptor is closed and the answer wiped. `process.exit` waits for that thread too; SIGKILL does not.
 *
 * Tests drive this with FIFOs and scripted files. EBUSY, partial reads and errors of the kernel's driver need a real chip
 * (or the kernel's vtpm proxy) to be seen.
 * @throws TpmError `transport` where the device cannot be opened
 */
export async function openDevice(path: string, options: DeviceOptions = {}): Promise<Transport> {
  let file: FileHandle;
  try {
    file = await open(path, 'r+');
  } catch (cause) {
    throw transportError(`${path} cannot be opened: ${explain(cause)}`, cause);
  }
  return new DeviceTransport(
    path,
    {
      // null: the driver keeps the position within an answer itself.
      write: async (bytes) => (await file.write(bytes, 0, bytes.length, null)).bytesWritten,
      read: async (into) => (await file.read(into, 0, into.length, null)).bytesRead,
      close: () => file.close(),
    },
    options,
  );
}
