import { bytesEqual } from 'vtpm-proto';
import type { AuditEntry } from './entry.js';
import { type AuditHead, EMPTY_HEAD, lineDigest } from './head.js';
import { type AuditKey, readLine } from './line.js';
import type { Line, Segment, Segments } from './segments.js';

/** The keys under which entries are authenticated. Those of other keys are held by the chain to the anchored head alone. */
export interface AuditKeys {
  readonly current: AuditKey;
  /** While the root key is rotated: the other one of the two under which the newest entries may be. */
  readonly other?: AuditKey;
}

/** The first thing that is wrong. */
export interface AuditFlaw {
  readonly entry: bigint;
  readonly path: string;
  /** Follows "entry N ". */
  readonly what: string;
}

/** What a verification found. */
export interface AuditReport {
  /** Number of the first verified entry; more than 1 where older files were moved away. */
  readonly first: bigint;
  /** Of the last verified entry. */
  readonly head: AuditHead;
  /** How many of them were verified by MAC too. */
  readonly authenticated: bigint;
  /** How many are newer than the anchor: the change of the store that each stands for may not have happened. */
  readonly unanchored: bigint;
  /** The beginning of an entry that was never acknowledged: the manager ended, or the disk, while it was written. */
  readonly torn?: { readonly path: string; readonly offset: number };
  readonly flaw?: AuditFlaw;
}

export interface VerifiedLine {
  readonly entry: AuditEntry;
  /** Without its newline. Shares memory with others: not to be kept. */
  readonly bytes: Buffer;
}

/** Goes along the chain from the beginning of a file on, up to the first flaw, and keeps no line. */
export class AuditWalk {
  readonly #keys: ReadonlyMap<number, Uint8Array>;
  #first = 0n;
  #head = EMPTY_HEAD;
  #authenticated = 0n;
  #segment: number | undefined;
  #torn: AuditReport['torn'];
  #flaw: AuditFlaw | undefined;

  /**
   * @param anchored the newest head that is known to be genuine
   * @param keys without them the chain proves what comes before `anchored`, and nothing may come after it
   */
  constructor(
    private readonly segments: Segments,
    private readonly anchored: AuditHead,
    keys?: AuditKeys,
  ) {
    const known = [keys?.current, keys?.other].filter((key) => key !== undefined);
    this.#keys = new Map(known.map(({ id, key }) => [id, key]));
  }

  get report(): AuditReport {
    const { length } = this.#head;
    return {
      first: this.#first,
      head: this.#head,
      authenticated: this.#authenticated,
      unanchored: length > this.anchored.length ? length - this.anchored.length : 0n,
      ...(this.#torn && { torn: this.#torn }),
      ...(this.#flaw && { flaw: this.#flaw }),
    };
  }

  /** Number of the file that was read last, where an entry or a name says it. */
  get segment(): number | undefined {
    return this.#segment;
  }

  /**
   * Verified lines, some at a time.
   * @param files some of the newest
   * @param last nothing after this entry is looked at
   * @throws ManagerError `newer-format`
   */
  async *lines(files: readonly Segment[], last?: bigint): AsyncGenerator<VerifiedLine[]> {
    for (const file of files) {
      let isFirst = true;
      this.#segment = file.number ?? this.#segment;
      for await (const lines of this.segments.lines(file)) {
        const verified: VerifiedLine[] = [];
        for (const line of lines) {
          if (this.#head.length === last) break;
          const entry = this.#isTorn(line, file) ? undefined : this.#verify(line, file, isFirst);
          if (!entry) break;
          verified.push({ entry, bytes: line.bytes });
          isFirst = false;
        }
        if (verified.length > 0) yield verified;
        if (this.#flaw || this.#torn || this.#head.length === last) return;
      }
    }
    this.#checkEnd();
  }

  /** Only the newest file may end so, after what is anchored. NUL: the file had grown and its content was not on the disk. */
  #isTorn({ bytes, end, offset }: Line, { isCurrent, path }: Segment): boolean {
    const isCut = end === 'file' || bytes.includes(0);
    if (!isCut || !isCurrent || this.#head.length < this.anchored.length) return false;
    this.#torn = { path, offset };
    return true;
  }

  /** @returns undefined where it found a flaw */
  #verify({ bytes, end }: Line, file: Segment, isFirst: boolean): AuditEntry | undefined {
    const expected = this.#head.length + 1n;
    const fail = (what: string, entry = expected): undefined => {
      this.#flaw = { entry, path: file.path, what };
    };
    const line = end === 'newline' ? readLine(bytes, this.#keys) : undefined;
    if (!line) return fail(end === 'file' ? 'is cut off' : 'is not what was written');
    const { n } = line.entry;
    const isStart = this.#first === 0n;
    if (!isStart && n !== expected) return fail(`is missing: entry ${n} is in its place`);
    if (line.isAuthentic === false) return fail("was not written under this installation's key", n);
    if (n > this.anchored.length && !line.isAuthentic) {
      return fail('is newer than the anchor and not written under the current key', n);
    }
    const before = isStart ? this.#before(n) : this.#head.digest;
    if (before && !bytesEqual(line.prev, before)) {
      return fail(`does not follow entry ${n - 1n}: one of the two was changed, or it is another history`, n);
    }
    if (isStart && n > this.anchored.length + 1n) {
      return fail('is missing: its file was removed', this.anchored.length);
    }
    if (!this.#isItsPlace(line.segment, n, file, isFirst)) {
      return fail('is in the wrong place: the beginning of its file is missing, or it is another file', n);
    }
    const digest = lineDigest(bytes);
    if (n === this.anchored.length && !bytesEqual(digest, this.anchored.digest)) {
      return fail('is not the one that was last anchored', n);
    }
    if (isStart) this.#first = n;
    if (line.isAuthentic) this.#authenticated++;
    this.#head = { length: n, digest };
    return line.entry;
  }

  /** The digest before the first line that is read, where it is known. */
  #before(n: bigint): Buffer | undefined {
    if (n === 1n) return EMPTY_HEAD.digest;
    return n === this.anchored.length + 1n ? this.anchored.digest : undefined;
  }

  #isItsPlace(segment: number | undefined, n: bigint, file: Segment, isFirst: boolean): boolean {
    if (!isFirst) return segment === undefined;
    if (segment === undefined || segment !== (file.number ?? segment)) return false;
    this.#segment = segment;
    return (segment === 1) === (n === 1n);
  }

  #checkEnd(): void {
    const { path, all } = this.segments;
    const { length } = this.#head;
    if (all.length === 0) {
      // Not even an empty log: one is begun by init alone.
      this.#flaw = { entry: this.anchored.length || 1n, path, what: 'is missing, as is the whole log' };
    } else if (length < this.anchored.length) {
      const what = `is missing: the log ends with entry ${length}`;
      this.#flaw = { entry: this.anchored.length, path, what };
    }
  }
}
