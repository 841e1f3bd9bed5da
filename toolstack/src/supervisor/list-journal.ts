import { createHash, randomBytes } from 'node:crypto';
import {
  closeSync,
  fdatasyncSync,
  fstatSync,
  ftruncateSync,
  openSync,
  readdirSync,
  readFileSync,
  rmSync,
  statSync,
  writeSync,
} from 'node:fs';
import { basename, dirname, join } from 'node:path';
import { barrier, syncDirectory } from 'vtpm-common';

/** One change of the list: the whole new entry, or the id of one that is gone. Neither is checked here. */
export type Change = { readonly set: unknown } | { readonly remove: unknown };

/**
 * What was changed in the list since it was last written whole: appended, a line for each change, to a file that the list
 * names. Each line holds a digest over itself and all before it, from the name of the file on.
 */
export class ListJournal {
  readonly #fd: number;
  readonly #inode: number;
  #bytes = 0;
  #digest: string;
  #isSpoilt = false;

  private constructor(
    readonly path: string,
    fd: number,
  ) {
    this.#fd = fd;
    this.#inode = fstatSync(fd).ino;
    this.#digest = firstDigest(path);
  }

  /** An empty one beside the list, durable. @param list path of the list */
  static create(list: string): ListJournal {
    const path = join(dirname(list), `${prefixOf(list)}${randomBytes(8).toString('hex')}`);
    const journal = new ListJournal(path, openSync(path, 'ax', 0o600));
    syncDirectory(dirname(path));
    return journal;
  }

  /**
   * The changes in their order. The beginning of a last line is what a crash left of a change that nobody was told of.
   * @throws Error where it is missing, or anything else in it is not as it was written
   */
  static read(list: string, name: unknown): Change[] {
    if (typeof name !== 'string' || basename(name) !== name || !name.startsWith(prefixOf(list))) {
      throw new Error('it names no journal');
    }
    const path = join(dirname(list), name);
    const lines = readFileSync(path, 'utf8').split('\n').slice(0, -1);
    let digest = firstDigest(path);
    return lines.map((line, index) => {
      const change = line.slice(65);
      digest = nextDigest(digest, change);
      if (line.slice(0, 65) !== `${digest} `) throw new Error(`${name}, line ${index + 1}`);
      return JSON.parse(change) as Change;
    });
  }

  /** Removes those that no list names any more. */
  static removeOthers(list: string, current: ListJournal | undefined): void {
    for (const name of readdirSync(dirname(list))) {
      const path = join(dirname(list), name);
      if (name.startsWith(prefixOf(list)) && path !== current?.path) rmSync(path, { force: true });
    }
  }

  get name(): string {
    return basename(this.path);
  }

  get bytes(): number {
    return this.#bytes;
  }

  /** Nobody took the file away, and its end is where this left it. */
  get isUsable(): boolean {
    if (this.#isSpoilt) return false;
    const found = statSync(this.path, { throwIfNoEntry: false });
    return found?.ino === this.#inode && found.size === this.#bytes;
  }

  /** Durable when it returns. Where it throws, the journal holds what it held, or is not usable any more. */
  append(change: Change): void {
    const text = JSON.stringify(change);
    const digest = nextDigest(this.#digest, text);
    const line = Buffer.from(`${digest} ${text}\n`);
    try {
      for (let offset = 0; offset < line.length; ) offset += writeSync(this.#fd, line, offset);
      barrier('journal.written');
      fdatasyncSync(this.#fd);
    } catch (error) {
      this.#cutBack();
      throw error;
    }
    this.#bytes += line.length;
    this.#digest = digest;
  }

  #cutBack(): void {
    try {
      ftruncateSync(this.#fd, this.#bytes);
      fdatasyncSync(this.#fd);
    } catch {
      this.#isSpoilt = true;
    }
  }

  close(): void {
    closeSync(this.#fd);
  }
}

function prefixOf(list: string): string {
  return `${basename(list, '.json')}.journal-`;
}

function firstDigest(path: string): string {
  return nextDigest('', basename(path));
}

function nextDigest(before: string, text: string): string {
  return createHash('sha256').update(`${before}\n${text}`).digest('hex');
}
