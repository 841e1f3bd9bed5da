import { closeSync, constants, openSync, readSync, statSync, writeSync } from 'node:fs';
import { Duplex } from 'node:stream';
import { FrontendError } from './error.js';
import { MAX_MESSAGE_BYTES } from './framing.js';
import { socketPair, systemCalls } from './system-calls.js';

const POLLIN = 1;
const NOTE = Buffer.of(0);

export function isDevice(path: string): boolean {
  return statSync(path, { throwIfNoEntry: false })?.isCharacterDevice() ?? false;
}

/** A character device that carries raw commands and answers: a port of virtio-serial, a TPM. @throws FrontendError */
export function openDevice(path: string): Duplex {
  try {
    return deviceStream(openSync(path, constants.O_RDWR | constants.O_NONBLOCK));
  } catch (cause) {
    throw new FrontendError('unreachable', `${path} cannot be opened: ${(cause as Error).message}`, cause);
  }
}

/**
 * One read is one chunk, and one chunk written is one write, as devices of messages want it. Node's event loop takes no
 * descriptors of devices, so another thread waits for them; a pair of sockets ends its wait.
 * @param fd owned by the stream from now on
 */
export function deviceStream(fd: number): Duplex {
  const { poll } = systemCalls();
  const [wake, waiting] = socketPair();
  // Two of struct pollfd: int descriptor, short events, short returned events.
  const descriptors = Buffer.alloc(16);
  descriptors.writeInt32LE(fd, 0);
  descriptors.writeInt16LE(POLLIN, 4);
  descriptors.writeInt32LE(waiting, 8);
  descriptors.writeInt16LE(POLLIN, 12);
  const buffer = Buffer.alloc(MAX_MESSAGE_BYTES);
  let isWaiting = false;
  let isOver = false;
  const end = (): void => {
    for (const one of [fd, wake, waiting]) closeSync(one);
  };
  // libuv joins its threads when the program ends.
  const wakeUp = (): void => void writeSync(wake, NOTE);
  process.once('exit', wakeUp);

  const stream = new Duplex({
    read() {
      if (isWaiting || isOver) return;
      isWaiting = true;
      poll.async(descriptors, 2, -1, () => {
        isWaiting = false;
        if (isOver) end();
        else readNow();
      });
    },
    write(chunk: Buffer, _encoding, done) {
      try {
        writeSync(fd, chunk);
        done();
      } catch (error) {
        done(error as Error);
      }
    },
    destroy(error, done) {
      isOver = true;
      process.removeListener('exit', wakeUp);
      wakeUp();
      if (!isWaiting) end();
      done(error);
    },
  });
  return stream;

  function readNow(): void {
    try {
      const length = readSync(fd, buffer);
      stream.push(length === 0 ? null : Buffer.from(buffer.subarray(0, length)));
    } catch (error) {
      const { code } = error as NodeJS.ErrnoException;
      if (code === 'EAGAIN') stream._read(0);
      else if (code === 'EPIPE') stream.push(null);
      else stream.destroy(error as Error);
    }
  }
}
