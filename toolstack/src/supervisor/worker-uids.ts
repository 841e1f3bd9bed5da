import { randomInt } from 'node:crypto';
import { closeSync, openSync, readFileSync } from 'node:fs';
import { lockByte, unlockByte } from 'vtpm-common';
import { ToolstackError } from '../error.js';

/** One byte of it is locked for each uid in use, by whatever supervisor of this host. The file itself stays empty. */
const LOCK_FILE = '/run/vtpm-worker-uids.lock';

export interface UidRange {
  readonly first: number;
  readonly last: number;
}

/** @param text `FIRST-LAST`. @throws ToolstackError `usage` */
export function parseUidRange(text: string): UidRange {
  const [, first, last] = (/^(\d{1,10})-(\d{1,10})$/.exec(text) ?? []).map(Number);
  // 65534 is nobody's; the kernel takes the last one, (uid_t) -1, for "none".
  if (first === undefined || last === undefined || first <= 65_535 || first > last || last >= 0xffffffff) {
    throw new ToolstackError(
      'usage',
      `worker-uids is FIRST-LAST, two numbers above 65535, for example 2000000000-2000065535, not "${text}"`,
    );
  }
  return { first, last };
}

export interface WorkerUidFiles {
  readonly passwd?: string;
  readonly subuid?: string;
  readonly lock?: string;
  /** Open lock file with the locks of the program before this one, for `adopt`. */
  readonly held?: number | undefined;
}

/**
 * Host uids for workers, each with one live worker at most: on this host, not only of this supervisor. A lock of the
 * kernel says so, which ends with the supervisor, as its workers do.
 */
export class WorkerUids {
  readonly #range: UidRange;
  readonly #lock: number;
  readonly #used = new Set<number>();
  #next: number;

  /** @throws ToolstackError `usage` where somebody has a uid of the range; an error of the file system */
  constructor(range: UidRange, files: WorkerUidFiles = {}) {
    this.#range = range;
    expectNobodys(range, files.passwd ?? '/etc/passwd', files.subuid ?? '/etc/subuid');
    this.#lock = files.held ?? openSync(files.lock ?? LOCK_FILE, 'a', 0o600);
    // Anywhere: what an ended worker still left is then most likely not met.
    this.#next = randomInt(range.first, range.last + 1);
  }

  /** @throws ToolstackError `layer-missing` where all are in use */
  take(): number {
    const { first, last } = this.#range;
    for (let tried = 0; tried <= last - first; tried++) {
      const uid = this.#next;
      this.#next = uid === last ? first : uid + 1;
      if (this.#used.has(uid) || !lockByte(this.#lock, uid)) continue;
      this.#used.add(uid);
      return uid;
    }
    throw new ToolstackError(
      'layer-missing',
      `all uids from ${first} to ${last} are used by workers; make the range worker-uids longer`,
    );
  }

  /** One that is locked already. */
  adopt(uid: number): void {
    this.#used.add(uid);
  }

  /** Of the lock file: its locks last as long as it is open anywhere. */
  get descriptor(): number {
    return this.#lock;
  }

  /** Only when no process of that uid is left. */
  give(uid: number): void {
    if (this.#used.delete(uid)) unlockByte(this.#lock, uid);
  }

  close(): void {
    closeSync(this.#lock);
  }
}

/** passwd(5) and subuid(5). Users of a directory service are not seen: the default range is far from theirs. */
function expectNobodys({ first, last }: UidRange, passwd: string, subuid: string): void {
  const lines = (path: string): string[][] => read(path).map((line) => line.split(':'));
  const users = lines(passwd).map(([name, , uid]) => ({ name, from: Number(uid), to: Number(uid) }));
  const ranges = lines(subuid).map(([name, from, count]) => ({
    name,
    from: Number(from),
    to: Number(from) + Number(count) - 1,
  }));
  const taken = [...users, ...ranges].find(({ from, to }) => from <= last && to >= first);
  if (taken) {
    throw new ToolstackError(
      'usage',
      `worker-uids ${first}-${last} overlaps with what ${taken.name} has (${taken.from} to ${taken.to}); choose another range`,
    );
  }
}

function read(path: string): string[] {
  try {
    return readFileSync(path, 'utf8').split('\n').filter(Boolean);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return [];
    throw error;
  }
}
