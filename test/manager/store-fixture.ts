import { execFileSync } from 'node:child_process';
import { createHash, randomBytes } from 'node:crypto';
import { mkdtempSync, readdirSync, readFileSync, realpathSync, rmSync } from 'node:fs';
import { createRequire } from 'node:module';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { createLogger } from 'vtpm-common';
import { ManagerError } from 'vtpm-manager/error';
import {
  type AnchoredStore,
  createAnchoredStore,
  openAnchoredStore,
  openLmdbStore,
  type StateStore,
} from 'vtpm-manager/store/index';
import { isA } from '../support/is-a.js';
import { MemoryCounter } from '../support/memory-counter.js';
import { anchorOptions, testKeys } from '../support/test-keys.js';

export const WRITER = fileURLToPath(new URL('./store-writer.js', import.meta.url));

const log = createLogger('test', { 'log-level': 'silent', 'log-format': 'json' });

/** A directory for one store, and the stores that a test has open on it. */
export class StoreFixture {
  readonly parent = realpathSync(mkdtempSync(join(tmpdir(), 'vtpm-store-')));
  readonly directory: string;
  readonly storeId = randomBytes(16);
  readonly rootKey = randomBytes(32);
  /** The TPM's counter, which is not on the disk. */
  readonly counter = new MemoryCounter();
  readonly anchor = anchorOptions(testKeys(this.storeId, this.rootKey), this.counter);
  /** What `onLost` was called with, in order. */
  readonly lost: ManagerError[] = [];
  readonly #open: StateStore[] = [];

  constructor(name = 'store') {
    this.directory = join(this.parent, name);
  }

  get dataFile(): string {
    return join(this.directory, 'data.mdb');
  }

  async open(create = false, sandbox = true): Promise<StateStore> {
    const store = await openLmdbStore({
      directory: this.directory,
      create,
      sandbox,
      log,
      onLost: (error) => this.lost.push(error),
    });
    this.#open.push(store);
    return store;
  }

  /** A new anchored store. `wrap` stands between it and the store process. */
  async create(wrap = (store: StateStore) => store): Promise<AnchoredStore> {
    return createAnchoredStore(wrap(await this.open(true)), this.anchor);
  }

  async reopen(anchor = this.anchor): Promise<AnchoredStore> {
    const store = await this.open();
    try {
      return await openAnchoredStore(store, anchor);
    } catch (error) {
      await store.close();
      throw error;
    }
  }

  async destroy(): Promise<void> {
    for (const store of this.#open) await store.close();
    rmSync(this.parent, { recursive: true, force: true });
  }

  /** The Node process that has the store's files, not bubblewrap around it. */
  childPid(): number {
    const pids = readdirSync('/proc').filter((name) => /^\d+$/.test(name));
    const found = pids.filter((pid) => {
      const args = argumentsOf(pid);
      return args[0] === process.execPath && args.at(-2) === this.directory;
    });
    if (found.length !== 1) throw new Error(`${found.length} processes have the store`);
    return Number(found[0]);
  }

  /** Limits the size of the files that the store process may write, in bytes; undefined lifts the limit. */
  limitFiles(bytes: number | undefined): void {
    execFileSync('prlimit', ['--pid', String(this.childPid()), `--fsize=${bytes ?? 'unlimited'}:`]);
  }

  /** Changes the files as somebody with control of the disk does. */
  tamper(change: (db: Lmdb) => void): void {
    tamperStore(this.directory, change);
  }
}

export interface Lmdb {
  getEntry(key: string): { value: Buffer; version: number } | undefined;
  putSync(key: string, value: Uint8Array, version: number): boolean;
  removeSync(key: string): boolean;
  transactionSync(action: () => void): void;
  close(): Promise<void>;
}

// The manager's own copy of the library: the tests do not depend on it otherwise.
const lmdb = createRequire(fileURLToPath(import.meta.resolve('vtpm-manager/store/index')))('lmdb') as {
  open(options: object): Lmdb;
};

/** Opens the files of a store through LMDB, without the manager, whether or not it runs. The caller closes it. */
export function openLmdb(directory: string): Lmdb {
  return lmdb.open({
    path: directory,
    noSubdir: false,
    encoding: 'binary',
    useVersions: true,
    overlappingSync: false,
    // Nothing here is about power loss.
    noSync: true,
  });
}

/** Changes the files of a store in one transaction. */
export function tamperStore(directory: string, change: (db: Lmdb) => void): void {
  const db = openLmdb(directory);
  try {
    db.transactionSync(() => change(db));
  } finally {
    db.close();
  }
}

function argumentsOf(pid: string): string[] {
  try {
    return readFileSync(`/proc/${pid}/cmdline`, 'utf8').split('\0').slice(0, -1);
  } catch {
    return [];
  }
}

/** A value that says which record and version it belongs to, all through. */
export function contentOf(key: string, version: number, bytes = 6000): Buffer {
  const unit = createHash('sha256').update(`${key} ${version}`).digest();
  return Buffer.alloc(bytes, unit);
}

/** For assert.rejects: a ManagerError with this code whose message matches. */
export function refusal(code: string, message = /./): (error: unknown) => boolean {
  return (error) => {
    if (!isA(error, ManagerError)) throw error;
    if (error.code !== code || !message.test(error.message)) {
      throw new Error(`expected ${code} ${message}, got ${error.code}: ${error.message}`, { cause: error });
    }
    return true;
  };
}
