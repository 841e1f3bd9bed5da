import { koffi } from 'vtpm-common/libc';

const libc = koffi.load('libc.so.6');
const makeSocket = libc.func('int socket(int domain, int type, int protocol)');
const connectTo = libc.func('int connect(int fd, void *address, uint32_t length)');
const setOption = libc.func('int setsockopt(int fd, int level, int name, void *value, uint32_t length)');
const send = libc.func('long send(int fd, void *buffer, size_t length, int flags)');
const recv = libc.func('long recv(int fd, void *buffer, size_t length, int flags)');
const close = libc.func('int close(int fd)');
const malloc = libc.func('void *malloc(size_t size)');
const clockNanosleep = libc.func('int clock_nanosleep(int clock, int flags, void *request, void *remain)');

const AF_UNIX = 1;
const SOCK_STREAM_CLOEXEC = 1 | 0o2000000;
const SOL_SOCKET = 1;
const SO_RCVTIMEO = 20;
const MSG_NOSIGNAL = 0x4000;
const CLOCK_MONOTONIC = 1;
const BUFFER_BYTES = 4096;
const ANSWER_SECONDS = 60n;

// Addresses are cheaper to pass than buffers.
const memory = malloc(2 * BUFFER_BYTES + 16) as bigint;
const command = Buffer.from(koffi.view(memory, BUFFER_BYTES));
const answerAddress = memory + BigInt(BUFFER_BYTES);
const answer = Buffer.from(koffi.view(answerAddress, BUFFER_BYTES));
const timeAddress = memory + BigInt(2 * BUFFER_BYTES);
const time = Buffer.from(koffi.view(timeAddress, 16));

/**
 * A client that does nothing but send(2) and recv(2), and blocks this process meanwhile: the same for both sides of a
 * comparison, at about two microseconds of its own for a round trip.
 */
export class BlockingClient {
  readonly #fd: number;

  /** @param at path of a socket, or a connected one, which is closed with the client */
  constructor(at: string | number) {
    if (typeof at === 'number') {
      this.#fd = at;
      return;
    }
    const path = at;
    const name = Buffer.from(path);
    const address = Buffer.alloc(110);
    address.writeUInt16LE(AF_UNIX, 0);
    name.copy(address, 2);
    this.#fd = Number(makeSocket(AF_UNIX, SOCK_STREAM_CLOEXEC, 0));
    const timeout = Buffer.alloc(16);
    timeout.writeBigInt64LE(ANSWER_SECONDS, 0);
    setOption(this.#fd, SOL_SOCKET, SO_RCVTIMEO, timeout, 16);
    if (Number(connectTo(this.#fd, address, name.length + 3)) !== 0) {
      const errno = koffi.errno();
      close(this.#fd);
      throw new Error(`${path}: connect failed with errno ${errno}`);
    }
  }

  /** A view that is valid until the next call. */
  transmit(bytes: Buffer): Buffer {
    command.set(bytes);
    return this.exchange(bytes.length);
  }

  /** As `transmit`, of what lies in the buffer already. */
  exchange(length: number): Buffer {
    if (Number(send(this.#fd, memory, length, MSG_NOSIGNAL)) !== length) throw new Error('send failed');
    let filled = Number(recv(this.#fd, answerAddress, BUFFER_BYTES, 0));
    while (filled > 0 && (filled < 10 || filled < answer.readUInt32BE(2))) {
      const more = Number(recv(this.#fd, answerAddress + BigInt(filled), BUFFER_BYTES - filled, 0));
      filled = more <= 0 ? -1 : filled + more;
    }
    if (filled <= 0) throw new Error('the connection ended, or there was no answer');
    return answer.subarray(0, filled);
  }

  /** Begins a call of a daemon's API. @param body small enough that all is one message below 4 KiB */
  call(method: string, path: string, body = ''): void {
    const length = Buffer.byteLength(body);
    const head = `${method} ${path} HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\ncontent-length: ${length}\r\n\r\n`;
    const bytes = command.write(head + body, 'latin1');
    if (bytes !== head.length + length || Number(send(this.#fd, memory, bytes, MSG_NOSIGNAL)) !== bytes) {
      throw new Error(`${method} ${path} cannot be sent`);
    }
  }

  /** Waits for the answer to `call`. @throws Error where it is not of the 200s */
  answered(): string {
    let text = '';
    for (;;) {
      const filled = Number(recv(this.#fd, answerAddress, BUFFER_BYTES, 0));
      if (filled <= 0) throw new Error(`the connection ended after: ${text}`);
      text += answer.toString('latin1', 0, filled);
      const body = text.indexOf('\r\n\r\n') + 4;
      const length = Number(/^content-length: (\d+)/im.exec(text)?.[1]);
      if (body < 4 || text.length < body + length) continue;
      if (!/^HTTP\/1.1 2/.test(text)) throw new Error(text);
      return text.slice(body);
    }
  }

  /** @throws Error where the TPM answers with anything but success */
  succeed(bytes: Buffer): Buffer {
    const response = this.transmit(bytes);
    const code = response.readUInt32BE(6);
    if (code !== 0)
      throw new Error(`TPM command 0x${bytes.readUInt32BE(6).toString(16)}: 0x${code.toString(16)}`);
    return response;
  }

  /** Milliseconds of `count` round trips of the same command, each begun `paceMs` after the last one; 0: at once. */
  measure(bytes: Buffer, count: number, paceMs: number): number[] {
    this.succeed(bytes);
    const times: number[] = [];
    for (let left = count; left > 0; left--) {
      if (paceMs > 0) sleep(paceMs);
      const start = process.hrtime.bigint();
      const response = this.exchange(bytes.length);
      times.push(Number(process.hrtime.bigint() - start) / 1e6);
      if (response.readUInt32BE(6) !== 0) throw new Error('a measured command failed');
    }
    return times;
  }

  close(): void {
    close(this.#fd);
  }
}

function sleep(milliseconds: number): void {
  time.writeBigInt64LE(0n, 0);
  time.writeBigInt64LE(BigInt(Math.round(milliseconds * 1e6)), 8);
  clockNanosleep(CLOCK_MONOTONIC, 0, timeAddress, null);
}
