import { closeSync } from 'node:fs';
import { koffi, SystemCallError } from './libc.js';

// What a service manager gives its services, in systemd's form: sd_notify(3), sd_listen_fds(3), sd_watchdog_enabled(3).
// Node has no datagram sockets of the unix family.
const libc = koffi.load('libc.so.6');
const socket = libc.func('int socket(int domain, int type, int protocol)');
const sendto = libc.func(
  'long sendto(int fd, const void *data, size_t length, int flags, const void *address, uint32_t size)',
);
const getsockname = libc.func('int getsockname(int fd, void *address, _Inout_ uint32_t *size)');

const AF_UNIX = 1;
const SOCK_DGRAM_CLOEXEC = 2 | 0o2000000;
const MSG_NOSIGNAL = 0x4000;
/** struct sockaddr_un (unix(7)): family, then sun_path of 108 bytes. */
const FAMILY_BYTES = 2;
const ADDRESS_BYTES = 110;
const FIRST_PASSED_FD = 3;

/** Tells the service manager that started this process how it is. Does nothing where none did. */
export class ServiceNotifier {
  readonly #address: Buffer | undefined;
  readonly #watchdog: NodeJS.Timeout | undefined;

  /**
   * Takes its variables out of `env`: they are not for the processes that this one starts. A watchdog that is asked for is
   * served from the event loop from now on, so that a process whose loop stands still is started anew.
   */
  constructor(env: NodeJS.ProcessEnv = process.env) {
    const { NOTIFY_SOCKET: path, WATCHDOG_USEC: period, WATCHDOG_PID: pid } = env;
    for (const name of ['NOTIFY_SOCKET', 'WATCHDOG_USEC', 'WATCHDOG_PID']) delete env[name];
    this.#address = path ? addressOf(path) : undefined;
    const isOurs = pid === undefined || Number(pid) === process.pid;
    if (!this.#address || !isOurs || !/^[1-9]\d*$/.test(period ?? '')) return;
    this.#watchdog = setInterval(() => this.#send('WATCHDOG=1'), Number(period) / 2000);
    this.#watchdog.unref();
  }

  /** It serves. @param status for who looks at the service */
  ready(status: string): void {
    this.#send(`READY=1\nSTATUS=${status}`);
  }

  /** It begins to end. */
  stopping(): void {
    clearInterval(this.#watchdog);
    this.#send('STOPPING=1\nSTATUS=stopping');
  }

  /** What cannot be told is not worth ending for. */
  #send(state: string): void {
    if (!this.#address) return;
    const fd = socket(AF_UNIX, SOCK_DGRAM_CLOEXEC, 0);
    if (fd < 0) return;
    const data = Buffer.from(state);
    sendto(fd, data, data.length, MSG_NOSIGNAL, this.#address, this.#address.length);
    closeSync(fd);
  }
}

let passed: Map<string, number> | undefined;

/**
 * The listening socket on `path` that the service manager made and passed on, once; afterwards it is the caller's.
 * Who closes it leaves its file: the next process gets the same one, and whoever connects meanwhile waits for that.
 */
export function takePassedListener(path: string): number | undefined {
  passed ??= passedListeners(process.env);
  const fd = passed.get(path);
  passed.delete(path);
  return fd;
}

function passedListeners(env: NodeJS.ProcessEnv): Map<string, number> {
  const { LISTEN_PID: pid, LISTEN_FDS: count } = env;
  for (const name of ['LISTEN_PID', 'LISTEN_FDS', 'LISTEN_FDNAMES']) delete env[name];
  const found = new Map<string, number>();
  if (Number(pid) !== process.pid) return found;
  for (let fd = FIRST_PASSED_FD; fd < FIRST_PASSED_FD + Number(count); fd++) found.set(pathOf(fd), fd);
  return found;
}

/** `@name` is in the abstract namespace, with a NUL in place of the `@`. */
function addressOf(path: string): Buffer {
  const address = Buffer.alloc(FAMILY_BYTES + Buffer.byteLength(path));
  address.writeUInt16LE(AF_UNIX, 0);
  address.write(path, FAMILY_BYTES);
  if (path.startsWith('@')) address[FAMILY_BYTES] = 0;
  return address;
}

function pathOf(fd: number): string {
  const address = Buffer.alloc(ADDRESS_BYTES);
  const size = [ADDRESS_BYTES];
  if (getsockname(fd, address, size) !== 0) throw new SystemCallError('getsockname', koffi.errno());
  const end = address.indexOf(0, FAMILY_BYTES);
  return address.toString('utf8', FAMILY_BYTES, end < 0 ? size[0] : end);
}
