import { setTimeout as sleep } from 'node:timers/promises';
import { concat, wipe } from '../bytes.js';
import { announcedSize, type Transport, transportError } from './transport.js';

/** What the kernel's driver can take or give at once (drivers/char/tpm/tpm-dev.h: TPM_BUFSIZE). */
const BUFFER = 4096;

export interface DeviceOptions {
  /**
   * Milliseconds that one command may take. The kernel bounds them itself, at 300 s where a key is generated, and says
   * ETIME then; the default of 360 s is for a driver that does not come back.
   */
  readonly deadline?: number;
  /** Milliseconds to wait where the driver says EBUSY: it still has the answer to an earlier command, or executes one. */
  readonly busyWait?: number;
}

/** The three calls that a device needs. */
export interface DeviceFile {
  /** @returns how many bytes were taken */
  write(bytes: Uint8Array): Promise<number>;
  /** @returns how many bytes came; 0 where there are none */
  read(into: Uint8Array): Promise<number>;
  close(): Promise<void>;
}

/**
 * Commands and answers as Linux' TPM character devices take them (drivers/char/tpm/tpm-dev-common.c): a command in one
 * write, which returns when the TPM is done; then the answer, in one read or, from 5.1 on, in as many as are asked for.
 */
export class DeviceTransport implements Transport {
  readonly #deadline: number;
  readonly #busyWait: number;
  #failure: Error | undefined;
  #isBusy = false;
  #closing: Promise<void> | undefined;
  #rejectWaiter: (error: Error) => void = () => undefined;

  constructor(
    private readonly path: string,
    private readonly file: DeviceFile,
    options: DeviceOptions = {},
  ) {
    this.#deadline = options.deadline ?? 360_000;
    this.#busyWait = options.busyWait ?? 10_000;
  }

  async transmit(command: Uint8Array): Promise<Buffer> {
    if (this.#failure !== undefined) throw transportError(`${this.path} failed before`, this.#failure);
    if (this.#isBusy) throw transportError(`${this.path}: a command is already under way`);
    this.#isBusy = true;
    const timer = setTimeout(() => this.#fail(`no answer within ${this.#deadline} ms`), this.#deadline);
    return new Promise((resolve, reject) => {
      this.#rejectWaiter = reject;
      this.#exchange(command)
        .then(resolve, (cause: unknown) => this.#fail(explain(cause), cause))
        .finally(() => {
          clearTimeout(timer);
          this.#isBusy = false;
          if (this.#failure !== undefined) void this.#closeFile().catch(() => undefined);
        });
    });
  }

  /** Does not wait for a command under way: `openDevice` says what becomes of it. */
  async close(): Promise<void> {
    this.#fail('closed');
    if (!this.#isBusy) await this.#closeFile();
  }

  async #exchange(command: Uint8Array): Promise<Buffer> {
    // Copies: after a deadline the thread pool still reads and writes them, when the caller has long wiped its own.
    const bytes = concat(command);
    const buffer = Buffer.alloc(BUFFER);
    try {
      await this.#write(bytes);
      let received = 0;
      for (;;) {
        this.#throwIfEnded();
        const count = await this.file.read(buffer.subarray(received));
        // Nobody waits any more for what came after the deadline: it is wiped.
        this.#throwIfEnded();
        received += count;
        const answer = buffer.subarray(0, received);
        const size = announcedSize(answer, BUFFER);
        if (count === 0) throw new Error(`the answer ended after ${received} of ${size ?? 'unknown'} bytes`);
        if (size === undefined || received < size) continue;
        if (received > size) throw new Error(`an answer of ${received} bytes, ${size} announced`);
        return concat(answer);
      }
    } finally {
      wipe(bytes, buffer);
    }
  }

  async #write(bytes: Uint8Array): Promise<void> {
    const giveUp = Date.now() + this.#busyWait;
    for (let pause = 5; ; pause = Math.min(pause * 2, 250)) {
      this.#throwIfEnded();
      try {
        const written = await this.file.write(bytes);
        if (written !== bytes.length) throw new Error(`${written} of ${bytes.length} bytes written`);
        return;
      } catch (error) {
        if ((error as NodeJS.ErrnoException).code !== 'EBUSY' || Date.now() >= giveUp) throw error;
        // Nothing was taken.
        await sleep(pause);
      }
    }
  }

  #throwIfEnded(): void {
    if (this.#failure !== undefined) throw this.#failure;
  }

  #fail(message: string, cause?: unknown): void {
    if (this.#failure !== undefined) return;
    this.#failure = transportError(`${this.path}: ${message}`, cause);
    this.#rejectWaiter(this.#failure);
  }

  #closeFile(): Promise<void> {
    this.#closing ??= this.file.close();
    return this.#closing;
  }
}

/** Why an open, write or read failed, and what to do. */
export function explain(cause: unknown): string {
  const { code, syscall, message } = cause as NodeJS.ErrnoException;
  switch (code) {
    case 'ENOENT':
      return 'there is no such device';
    case 'EACCES':
      return 'permission denied; its group is usually "tss"';
    case 'EBUSY':
      if (syscall === 'open') return 'another program is using it; use /dev/tpmrm0';
      return 'EBUSY: an earlier command on this descriptor is not over, or nobody has read its answer';
    case 'ETIME':
      return 'ETIME: the TPM did not answer within the time that the kernel gives a command; see the kernel log';
    case 'EPIPE':
      return 'EPIPE: the TPM is gone: its driver was unbound, or the machine goes to sleep';
    case 'EIO':
      return 'EIO: the driver cannot talk to the TPM; see the kernel log';
    case 'ENOMEM':
      return "ENOMEM: no room in the kernel's resource manager; flush what is loaded through this descriptor";
    default:
      return message;
  }
}
