import {
  closeSync,
  existsSync,
  fsyncSync,
  openSync,
  readSync,
  rmSync,
  statfsSync,
  statSync,
  writeSync,
} from 'node:fs';
import { join } from 'node:path';
import { ABORT, open, type RootDatabase } from 'lmdb';
import { Answer, PAGE_BYTES } from './child-protocol.js';
import { isStoreKey, MAX_VALUE_BYTES } from './limits.js';
import type { StoreEntry, StoreWrite } from './state-store.js';

/**
 * The LMDB files of a store, as the store process uses them. Every call is synchronous: an error is thrown where it
 * happens, whereas lmdb's own write thread rejects a promise that nobody can reach, which ends the process.
 */
export interface Environment {
  get(key: string): StoreEntry | undefined;
  /** Durable when it returns. @returns false where a version was stale */
  commit(writes: readonly StoreWrite[]): boolean;
  list(after: string | undefined, limit: number): StoreEntry[];
}

/** A failure with the answer that the manager gets. */
export class EnvironmentError extends Error {
  override readonly name = 'EnvironmentError';
  constructor(
    readonly answer: number,
    message: string,
    options?: { cause?: unknown },
  ) {
    super(message, options);
  }
}

/** The transaction neither happened nor can be known not to have happened: only opening again tells. */
export class UncertainError extends Error {
  override readonly name = 'UncertainError';
}

// Address space only; LMDB grows the file as it needs it. 50,000 records of 16 KiB are 0.8 GiB.
const MAP_BYTES = 64 * 2 ** 30;
// Two meta pages. LMDB takes a shorter file for a new one and would begin an empty store in it.
const PAGE = 4096;
const LEAST_FILE_BYTES = 2 * PAGE;
/** MDB_meta, behind a page header of 24 bytes: magic and version, each u32 in the order of this machine (lmdb.h, mdb.c). */
const META_AT = 24;
const MAGIC = 0xbeefc0de;
const LMDB_VERSION = 2;

/** @throws EnvironmentError */
export function openEnvironment(directory: string, create: boolean): Environment {
  const file = join(directory, 'data.mdb');
  if (create && existsSync(file)) {
    throw new EnvironmentError(Answer.exists, `${directory} holds a store already`);
  }
  if (!create) {
    if (!existsSync(file)) throw new EnvironmentError(Answer.missing, `${file} does not exist`);
    if (statSync(file).size < LEAST_FILE_BYTES) {
      throw new EnvironmentError(Answer.corrupt, `${file} is too short to be a store`);
    }
    checkVersion(file);
  }
  try {
    const db = open<Buffer, string>({
      path: directory,
      // Otherwise a directory with a dot in its name is taken for a file.
      noSubdir: false,
      encoding: 'binary',
      useVersions: true,
      overlappingSync: false,
      mapSize: MAP_BYTES,
    });
    if (create) syncDirectory(directory);
    return new LmdbEnvironment(db, directory);
  } catch (cause) {
    throw named(cause, directory, 0);
  }
}

/** LMDB itself crashes on what a newer one wrote. @throws EnvironmentError */
function checkVersion(file: string): void {
  const fd = openSync(file, 'r');
  try {
    const meta = Buffer.alloc(8);
    for (const page of [0, PAGE]) {
      readSync(fd, meta, 0, meta.length, page + META_AT);
      const version = meta.readUInt32LE(4);
      // What is not a meta page at all LMDB says itself.
      if (meta.readUInt32LE(0) === MAGIC && version > LMDB_VERSION && version < 1000) {
        throw new EnvironmentError(
          Answer.newer,
          `${file} has version ${version} of LMDB, this version knows ${LMDB_VERSION}; run the version that wrote it`,
        );
      }
    }
  } finally {
    closeSync(fd);
  }
}

class LmdbEnvironment implements Environment {
  constructor(
    private readonly db: RootDatabase<Buffer, string>,
    private readonly directory: string,
  ) {}

  get(key: string): StoreEntry | undefined {
    try {
      const found = this.db.getEntry(key);
      return found && checkEntry({ key, version: found.version, value: found.value });
    } catch (cause) {
      throw named(cause, this.directory, 0);
    }
  }

  commit(writes: readonly StoreWrite[]): boolean {
    try {
      return this.db.transactionSync(() => this.#apply(writes)) === true;
    } catch (cause) {
      this.#checkUsable(cause);
      const bytes = writes.reduce((sum, write) => sum + (write.value?.length ?? 0), 0);
      const error = named(cause, this.directory, bytes);
      // A disk that fails is no reason to go on with the same open files.
      if (error.answer === Answer.failed) throw new UncertainError(error.message, { cause });
      throw error;
    }
  }

  list(after: string | undefined, limit: number): StoreEntry[] {
    try {
      const entries: StoreEntry[] = [];
      let bytes = 0;
      const range = {
        limit,
        versions: true,
        ...(after === undefined ? {} : { start: after, exclusiveStart: true }),
      };
      for (const { key, version, value } of this.db.getRange(range)) {
        const entry = checkEntry({ key, version, value });
        entries.push(entry);
        bytes += entry.value.length;
        if (bytes >= PAGE_BYTES) break;
      }
      return entries;
    } catch (cause) {
      throw named(cause, this.directory, 0);
    }
  }

  #apply(writes: readonly StoreWrite[]): unknown {
    for (const { key, expectedVersion } of writes) {
      if (!this.db.doesExist(key, (expectedVersion === 0 ? null : expectedVersion) as number)) return ABORT;
    }
    for (const { key, expectedVersion, value } of writes) {
      const done =
        value === null ? this.db.removeSync(key) : this.putSync(key, value as Buffer, expectedVersion + 1);
      if (!done)
        throw new EnvironmentError(Answer.corrupt, `${key} could not be written although it was there`);
    }
    return true;
  }

  private putSync(key: string, value: Buffer, version: number): boolean {
    return this.db.putSync(key, value, version) as unknown as boolean;
  }

  /**
   * LMDB refuses all further transactions once it could not undo a meta page (MDB_PANIC): the commit is then neither
   * in the store nor out of it. lmdb ignores the error of mdb_txn_begin, so ask for something inside a transaction.
   */
  #checkUsable(cause: unknown): void {
    try {
      this.db.transactionSync(() => {
        this.db.doesExist('anchor');
        return ABORT;
      });
    } catch {
      throw new UncertainError(`the files can no longer be written: ${text(cause)}`, { cause });
    }
  }
}

// lmdb.h, "Return Codes"
const MDB_VERSION_MISMATCH = -30794;
const MDB_MAP_FULL = -30792;
const MDB_TXN_FULL = -30788;
const CORRUPT = new Set([
  -30797, // MDB_PAGE_NOTFOUND
  -30796, // MDB_CORRUPTED
  -30793, // MDB_INVALID
  -30787, // MDB_CURSOR_FULL
  -30786, // MDB_PAGE_FULL
  -30784, // MDB_INCOMPATIBLE
  -30781, // MDB_BAD_VALSIZE
  -30780, // MDB_BAD_DBI
]);
// errno(3): EFBIG, ENOSPC, EDQUOT
const FULL = new Set([27, 28, 122, MDB_MAP_FULL, MDB_TXN_FULL]);
const EIO = 5;

function named(cause: unknown, directory: string, bytes: number): EnvironmentError {
  if (cause instanceof EnvironmentError) return cause;
  const code = (cause as { code?: unknown }).code;
  const answer =
    code === MDB_VERSION_MISMATCH
      ? Answer.newer
      : typeof code === 'number' && CORRUPT.has(code)
        ? Answer.corrupt
        : // LMDB says EIO for a write that the kernel cut short, which is how a full disk begins.
          typeof code === 'number' && (FULL.has(code) || (code === EIO && isFull(directory, bytes)))
          ? Answer.full
          : Answer.failed;
  return new EnvironmentError(answer, text(cause), { cause });
}

/** Whether `bytes` and LMDB's pages around them find no room. */
function isFull(directory: string, bytes: number): boolean {
  const wanted = 2 * bytes + 256 * 1024;
  const { bavail, bsize } = statfsSync(directory);
  return bavail * bsize < wanted || !canWrite(join(directory, 'space-probe'), wanted);
}

/** statfs knows nothing of quotas and limits. */
function canWrite(path: string, bytes: number): boolean {
  try {
    const fd = openSync(path, 'w', 0o600);
    try {
      return writeSync(fd, Buffer.alloc(bytes)) === bytes;
    } finally {
      closeSync(fd);
    }
  } catch {
    return false;
  } finally {
    rmSync(path, { force: true });
  }
}

/** The disk may hold anything: a record that this program cannot have written is named, not passed on. */
function checkEntry(entry: { key: unknown; version: number | undefined; value: Buffer }): StoreEntry {
  const { key, version, value } = entry;
  if (!isStoreKey(key)) throw new EnvironmentError(Answer.corrupt, 'a record has a key that is none');
  if (version === undefined || !Number.isSafeInteger(version) || version < 1) {
    throw new EnvironmentError(Answer.corrupt, `${key} has a version that is none`);
  }
  if (value.length > MAX_VALUE_BYTES) throw new EnvironmentError(Answer.corrupt, `${key} is too large`);
  return { key, version, value };
}

function syncDirectory(path: string): void {
  const fd = openSync(path, 'r');
  try {
    fsyncSync(fd);
  } finally {
    closeSync(fd);
  }
}

function text(cause: unknown): string {
  return cause instanceof Error ? cause.message : String(cause);
}
