import { type ChildProcess, spawn } from 'node:child_process';
import { closeSync, realpathSync, statSync } from 'node:fs';
import type { Socket } from 'node:net';
import { dirname, join } from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { type Logger, lockFile, privateDirectory, syncDirectory } from 'vtpm-common';
import { ManagerError, type ManagerErrorCode } from '../error.js';
import {
  Answer,
  decodeEntries,
  encodeFrame,
  encodeKey,
  encodeList,
  encodeWrites,
  type Frame,
  FrameReader,
  ProtocolError,
  Request,
} from './child-protocol.js';
import { isStoreKey } from './limits.js';
import { childScript, environment, sandboxCommand } from './sandbox.js';
import { checkWrite, type StateStore, type StoreEntry, type StoreWrite } from './state-store.js';

export interface LmdbStoreOptions {
  /** Of the store alone; made where `create` is set. */
  readonly directory: string;
  /** Makes a new store. Never set because one is missing. */
  readonly create: boolean;
  /** false runs the store process without bubblewrap, for hosts that forbid user namespaces. */
  readonly sandbox: boolean;
  readonly log: Logger;
  /** The store process ended unasked; called once. Everything under way and later fails with the same error. */
  onLost(error: ManagerError): void;
}

/**
 * Starts the store process on a directory. One process at a time: another one that still has the directory, such as
 * that of a manager killed a moment ago, is waited for.
 * @throws ManagerError `store-missing`, `already-initialised`, `store-corrupt`, `store-full`, `newer-format`, `in-use`,
 * `internal` where the process cannot be started
 */
export async function openLmdbStore(options: LmdbStoreOptions): Promise<StateStore> {
  try {
    const store = await startStore(options);
    await store.opened.catch(async (error: unknown) => {
      await store.close();
      throw error;
    });
    return store;
  } catch (error) {
    throw ManagerError.from(error, `the store ${options.directory} cannot be opened`);
  }
}

/**
 * Opens a store for `body` alone, with the manager stopped, and closes it whatever happens. A store process that ends
 * meanwhile fails what `body` asks of it.
 */
export async function withLmdbStore<T>(
  options: Omit<LmdbStoreOptions, 'onLost'>,
  body: (store: StateStore) => Promise<T>,
): Promise<T> {
  const store = await openLmdbStore({ ...options, onLost: () => undefined });
  try {
    return await body(store);
  } finally {
    await store.close();
  }
}

async function startStore(options: LmdbStoreOptions): Promise<LmdbStore> {
  const directory = prepareDirectory(options.directory, options.create);
  const lock = await takeLock(directory);
  try {
    return new LmdbStore(startChild(directory, options, lock), options);
  } finally {
    // The process has its own copy, and with it the lock ends when the process does.
    closeSync(lock);
  }
}

const LOCK_WAIT_MS = 5000;
const LOCK_POLL_MS = 20;
const CLOSE_WAIT_MS = 5000;
const STDERR_CHARACTERS = 2000;

function prepareDirectory(directory: string, create: boolean): string {
  if (create) {
    privateDirectory(directory);
    syncDirectory(dirname(directory));
  } else if (!statSync(directory, { throwIfNoEntry: false })?.isDirectory()) {
    throw new ManagerError(
      'store-missing',
      `the store ${directory} does not exist; restore it from a backup. It is never made anew by itself`,
    );
  }
  return realpathSync(directory);
}

async function takeLock(directory: string): Promise<number> {
  const path = join(directory, 'lock');
  for (let waited = 0; ; waited += LOCK_POLL_MS) {
    const fd = lockFile(path);
    if (fd !== undefined) return fd;
    if (waited >= LOCK_WAIT_MS) {
      throw new ManagerError('in-use', `the store ${directory} is in use by another manager's store process`);
    }
    await delay(LOCK_POLL_MS);
  }
}

function startChild(directory: string, options: LmdbStoreOptions, lock: number): ChildProcess {
  const script = childScript();
  const args = [directory, options.create ? 'create' : 'open'];
  const [program = '', ...rest] = options.sandbox
    ? sandboxCommand(script, args, directory)
    : [process.execPath, script, ...args];
  return spawn(program, rest, {
    cwd: '/',
    // bwrap itself is looked for in PATH; it clears the environment for the process inside.
    env: options.sandbox ? { PATH: process.env.PATH } : Object.fromEntries(environment()),
    stdio: ['ignore', 'ignore', 'pipe', 'pipe', lock],
  });
}

interface Pending {
  resolve(frame: Frame): void;
  reject(error: ManagerError): void;
}

class LmdbStore implements StateStore {
  readonly opened: Promise<void>;
  readonly #exited: Promise<void>;
  readonly #channel: Socket;
  readonly #pending = new Map<number, Pending>();
  #nextId = 0;
  #isOpen = false;
  #closing: Promise<void> | undefined;
  #lost: ManagerError | undefined;
  #stderr = '';
  #killTimer: NodeJS.Timeout | undefined;

  constructor(
    private readonly child: ChildProcess,
    private readonly options: LmdbStoreOptions,
  ) {
    this.#channel = child.stdio[3] as Socket;
    this.opened = this.#request(undefined, []).then(() => {
      this.#isOpen = true;
    });
    this.#exited = new Promise((resolve) => {
      child.on('error', (error) => {
        this.#lose(startError(error));
        resolve();
      });
      // Not `exit`: answers that are still in the socket count.
      child.on('close', (code, signal) => {
        clearTimeout(this.#killTimer);
        this.#lose(this.#endError(code, signal));
        resolve();
      });
    });
    child.stderr?.setEncoding('utf8').on('data', (text: string) => {
      this.#stderr = (this.#stderr + text).slice(-STDERR_CHARACTERS);
    });
    const reader = new FrameReader();
    this.#channel.on('data', (chunk) => {
      try {
        for (const frame of reader.push(chunk)) this.#settle(frame);
      } catch (error) {
        this.#distrust(error);
      }
    });
    // What a broken channel means is in how the process ends, so let it.
    this.#channel.on('error', () => this.#killSoon());
    this.#channel.on('end', () => this.#killSoon());
  }

  async get(key: string): Promise<StoreEntry | undefined> {
    if (!isStoreKey(key)) throw new ManagerError('bad-request', 'this is no key of a record');
    const [entry, ...others] = this.#entries(await this.#request(Request.get, [encodeKey(key)]));
    if (others.length > 0 || (entry && entry.key !== key)) {
      throw this.#distrust(new ProtocolError('another record than was asked for'));
    }
    return entry;
  }

  async commit(writes: readonly StoreWrite[]): Promise<boolean> {
    for (const write of writes) checkWrite(write);
    return (await this.#request(Request.commit, encodeWrites(writes))).code === Answer.done;
  }

  async list(after: string | undefined, limit: number): Promise<StoreEntry[]> {
    return this.#entries(await this.#request(Request.list, encodeList(after, limit)));
  }

  close(): Promise<void> {
    this.#closing ??= this.#end();
    return this.#closing;
  }

  async #end(): Promise<void> {
    this.#killSoon();
    await this.#exited;
  }

  #killSoon(): void {
    this.#channel.end();
    this.#killTimer ??= setTimeout(() => this.child.kill('SIGKILL'), CLOSE_WAIT_MS);
  }

  #request(code: number | undefined, body: readonly Uint8Array[]): Promise<Frame> {
    return new Promise((resolve, reject) => {
      if (this.#lost) return reject(this.#lost);
      if (this.#closing) return reject(new ManagerError('shutting-down', 'the store is being closed'));
      const id = this.#nextId;
      if (code !== undefined) {
        let frame: Buffer;
        try {
          frame = encodeFrame(code, id, body);
        } catch (cause) {
          return reject(
            new ManagerError('too-large', 'the commit is larger than the store takes', { cause }),
          );
        }
        this.#channel.write(frame);
      }
      // 4 billion requests later the first ones are long answered.
      this.#nextId = (id + 1) >>> 0;
      this.#pending.set(id, { resolve, reject });
    });
  }

  #settle(frame: Frame): void {
    const pending = this.#pending.get(frame.id);
    if (!pending) throw new ProtocolError('an answer to nothing');
    const isAnswer = frame.code === Answer.done || frame.code === Answer.stale;
    const code = ERROR_CODES.get(frame.code);
    // Until here it is pending: distrust fails it with the others.
    if (!isAnswer && !code) throw new ProtocolError(`there is no answer ${frame.code}`);
    this.#pending.delete(frame.id);
    if (!code) {
      pending.resolve(frame);
      return;
    }
    const detail = frame.body.toString('utf8');
    pending.reject(
      new ManagerError(code, `the store ${this.options.directory}: ${detail}${ADVICE[code] ?? ''}`),
    );
  }

  #entries(frame: Frame): StoreEntry[] {
    try {
      return decodeEntries(frame.body);
    } catch (error) {
      throw this.#distrust(error);
    }
  }

  /** The process says what it never should: damaged memory, or somebody else's code. */
  #distrust(cause: unknown): ManagerError {
    const what = `the store process answers nonsense: ${(cause as Error).message}`;
    const error = new ManagerError('store-corrupt', what, { cause });
    this.#lose(error);
    this.child.kill('SIGKILL');
    return error;
  }

  #lose(error: ManagerError): void {
    if (this.#lost) return;
    this.#lost = error;
    const isAsked = this.#closing !== undefined;
    if (this.#stderr !== '') this.options.log.error({ stderr: this.#stderr }, 'the store process reported');
    for (const pending of this.#pending.values()) pending.reject(error);
    this.#pending.clear();
    if (this.#isOpen && !isAsked) this.options.onLost(error);
  }

  #endError(code: number | null, signal: NodeJS.Signals | null): ManagerError {
    if (this.#closing) return new ManagerError('shutting-down', 'the store is closed');
    const number = signal === null && code !== null && code > 128 ? code - 128 : undefined;
    const name = signal ?? (number === undefined ? undefined : (SIGNALS.get(number) ?? `signal ${number}`));
    const directory = this.options.directory;
    if (name !== undefined && CRASHES.has(name)) {
      return new ManagerError(
        'store-corrupt',
        `the store process crashed (${name}) on ${directory}: the files are damaged; restore them from a backup`,
      );
    }
    const how = name === undefined ? `ended with code ${code}` : `was ended by ${name}`;
    const why = this.#stderr
      .trim()
      .split('\n')
      .find((line) => line.trim() !== '');
    return new ManagerError(
      'internal',
      `the store process on ${directory} ${how}${why ? ` (${why.slice(0, 300)})` : ''}; start the manager again`,
    );
  }
}

// bubblewrap reports the signal that ended its child as 128 + number, as a shell does (signal(7)).
const SIGNALS = new Map<number, string>([
  [4, 'SIGILL'],
  [5, 'SIGTRAP'],
  [6, 'SIGABRT'],
  [7, 'SIGBUS'],
  [8, 'SIGFPE'],
  [9, 'SIGKILL'],
  [11, 'SIGSEGV'],
  [15, 'SIGTERM'],
]);

/** Signals that a process brings upon itself: only damaged files do that to LMDB. */
const CRASHES = new Set(['SIGILL', 'SIGTRAP', 'SIGABRT', 'SIGBUS', 'SIGFPE', 'SIGSEGV']);

const ERROR_CODES = new Map<number, ManagerErrorCode>([
  [Answer.full, 'store-full'],
  [Answer.corrupt, 'store-corrupt'],
  [Answer.missing, 'store-missing'],
  [Answer.exists, 'already-initialised'],
  [Answer.newer, 'newer-format'],
  [Answer.failed, 'internal'],
]);

const ADVICE: Partial<Record<ManagerErrorCode, string>> = {
  'store-full': '; nothing was written, make room on its disk',
  'store-corrupt': '; restore it from a backup',
  'store-missing': '; restore it from a backup. It is never made anew by itself',
};

function startError(error: Error): ManagerError {
  const isMissing = (error as NodeJS.ErrnoException).code === 'ENOENT';
  return new ManagerError(
    'internal',
    isMissing
      ? 'bubblewrap is not installed, so the store process cannot be confined; on Debian: apt-get install bubblewrap'
      : `the store process cannot be started: ${error.message}`,
    { cause: error },
  );
}
