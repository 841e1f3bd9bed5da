import { type ChildProcess, spawn } from 'node:child_process';
import { chmodSync, closeSync, mkdirSync } from 'node:fs';
import { dirname } from 'node:path';
import { koffi } from 'vtpm-common';
import { cleanEnvironment } from './installation.js';
import { reapAtExit } from './reap.js';

const libc = koffi.load('libc.so.6');
const socket = libc.func('int socket(int domain, int type, int protocol)');
const bind = libc.func('int bind(int fd, const void *address, uint32_t size)');
const listen = libc.func('int listen(int fd, int backlog)');
const recv = libc.func('long recv(int fd, _Out_ uint8_t *data, size_t size, int flags)');

const AF_UNIX = 1;
const SOCK_STREAM = 1;
const SOCK_DGRAM = 2;
const SOCK_CLOEXEC = 0o2000000;
const MSG_DONTWAIT = 0x40;

/** What systemd does for a service, as far as the service can see it: sockets it listens on, and where it is told how it is. */
export class ServiceManager {
  readonly #notify: number;
  readonly #listeners: number[] = [];
  readonly #told: string[] = [];

  /** @param address of the notification socket; `@name` is abstract */
  constructor(readonly address: string) {
    this.#notify = bound(SOCK_DGRAM, address);
  }

  /** Listens on `path`; whoever connects waits until a service accepts. */
  listen(path: string): void {
    mkdirSync(dirname(path), { recursive: true, mode: 0o700 });
    const fd = bound(SOCK_STREAM, path);
    chmodSync(path, 0o600);
    if (listen(fd, 16) !== 0) throw new Error(`listen(${path})`);
    this.#listeners.push(fd);
  }

  /** All that the service told, a datagram each. */
  get told(): readonly string[] {
    const data = Buffer.alloc(4096);
    for (;;) {
      const length = Number(recv(this.#notify, data, data.length, MSG_DONTWAIT));
      if (length < 0) return this.#told;
      this.#told.push(data.toString('utf8', 0, length));
    }
  }

  start(program: string, args: readonly string[], watchdogMs?: number): ChildProcess {
    const env = cleanEnvironment({
      NOTIFY_SOCKET: this.address,
      LISTEN_FDS: String(this.#listeners.length),
      ...(watchdogMs !== undefined && { WATCHDOG_USEC: String(watchdogMs * 1000) }),
    });
    // Only the process itself can say its number before it is the program.
    const script = 'LISTEN_PID=$$ WATCHDOG_PID=$$ exec "$@"';
    return reapAtExit(
      spawn('sh', ['-c', script, 'sh', process.execPath, program, ...args], {
        stdio: ['ignore', 'ignore', 'inherit', ...this.#listeners],
        env,
      }),
    );
  }

  close(): void {
    for (const fd of [this.#notify, ...this.#listeners]) closeSync(fd);
  }
}

function bound(type: number, path: string): number {
  const fd = socket(AF_UNIX, type | SOCK_CLOEXEC, 0);
  const address = Buffer.alloc(2 + Buffer.byteLength(path));
  address.writeUInt16LE(AF_UNIX, 0);
  address.write(path, 2);
  if (path.startsWith('@')) address[2] = 0;
  if (fd < 0 || bind(fd, address, address.length) !== 0) throw new Error(`bind(${path})`);
  return fd;
}
