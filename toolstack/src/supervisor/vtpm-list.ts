import { createHash } from 'node:crypto';
import { readFileSync, rmSync } from 'node:fs';
import { writeFileDurably } from 'vtpm-common';
import { ToolstackError } from '../error.js';
import { ENTRY_FORMAT, type Entry, parseEntry } from './entry.js';
import { type Change, ListJournal } from './list-journal.js';

/** Format number of the file; a newer one is refused by name, those before it are still read. Before 3 there is no journal. */
export const LIST_FORMAT = ENTRY_FORMAT;

/** A journal that is longer is worth a new list. */
const MOST_JOURNAL_BYTES = 1024 * 1024;

/**
 * The vTPMs of this host as the supervisor knows them. Every change is durable when the method returns. A file that
 * cannot be read is an error, never an empty list (I-9). Written whole by the first change of a process, then changes are
 * appended to a journal: each start makes two, and with many vTPMs the list is long.
 */
export class VtpmList {
  readonly #path: string;
  readonly #entries = new Map<string, Entry>();
  #journal: ListJournal | undefined;

  private constructor(path: string, entries: readonly Entry[]) {
    this.#path = path;
    for (const entry of entries) this.#entries.set(entry.id, entry);
  }

  /** Makes the file of a first start. */
  static create(path: string): VtpmList {
    const list = new VtpmList(path, []);
    list.#writeWhole(list.#entries);
    return list;
  }

  /**
   * @returns undefined where there is no file: whether that may be, only the caller knows
   * @throws ToolstackError `corrupt` | `newer-format`
   */
  static open(path: string): VtpmList | undefined {
    for (let text = readList(path); text !== undefined; ) {
      try {
        return new VtpmList(path, parseList(path, text));
      } catch (error) {
        // Somebody who only looks may have met a supervisor that wrote it anew.
        const again = readList(path);
        if (again === text) throw error;
        text = again;
      }
    }
    return undefined;
  }

  /** No more changes. What a supervisor that was stopped leaves is one file. */
  close(): void {
    if (this.#journal) this.#writeWhole(this.#entries);
  }

  get size(): number {
    return this.#entries.size;
  }

  all(): Entry[] {
    return [...this.#entries.values()];
  }

  get(id: string): Entry | undefined {
    return this.#entries.get(id);
  }

  /** @throws ToolstackError `name-taken` */
  add(entry: Entry): void {
    for (const other of this.#entries.values()) {
      if (other.id === entry.id || other.name === entry.name) {
        const what = other.id === entry.id ? `id ${entry.id}` : `name "${entry.name}"`;
        throw new ToolstackError('name-taken', `there is a vTPM with the ${what} already; choose another`);
      }
    }
    this.#apply({ set: entry }, (entries) => entries.set(entry.id, entry));
  }

  update(id: string, change: Partial<Omit<Entry, 'id' | 'name'>>): Entry {
    const old = this.#entries.get(id);
    if (!old) throw new ToolstackError('unknown-vtpm', `there is no vTPM ${id}`);
    const entry = { ...old, ...change };
    this.#apply({ set: entry }, (entries) => entries.set(id, entry));
    return entry;
  }

  remove(id: string): void {
    this.#apply({ remove: id }, (entries) => entries.delete(id));
  }

  /** Memory follows the disk: after a failed write the list is what it was. */
  #apply(change: Change, apply: (entries: Map<string, Entry>) => void): void {
    const journal = this.#journal;
    if (journal?.isUsable && journal.bytes < MOST_JOURNAL_BYTES) {
      journal.append(change);
    } else {
      const next = new Map(this.#entries);
      apply(next);
      this.#writeWhole(next, ListJournal.create(this.#path));
    }
    apply(this.#entries);
  }

  /** @param journal what later changes are appended to; it is there before the list that names it */
  #writeWhole(entries: ReadonlyMap<string, Entry>, journal?: ListJournal): void {
    const content = { format: LIST_FORMAT, journal: journal?.name ?? null, vtpms: [...entries.values()] };
    const sha256 = digestOf(content);
    try {
      writeFileDurably(this.#path, `${JSON.stringify({ ...content, sha256 }, null, 2)}\n`);
    } catch (error) {
      // Which of the two lists a power loss leaves is not known once the new one is there: then the journals of both stay.
      this.#useJournal(undefined);
      journal?.close();
      if (journal && !names(this.#path, journal)) rmSync(journal.path, { force: true });
      throw error;
    }
    this.#useJournal(journal);
    ListJournal.removeOthers(this.#path, journal);
  }

  #useJournal(journal: ListJournal | undefined): void {
    this.#journal?.close();
    this.#journal = journal;
  }
}

/** A flipped bit inside a name or a signature leaves valid JSON, so the content carries its digest. */
function digestOf(content: unknown): string {
  return createHash('sha256').update(JSON.stringify(content)).digest('hex');
}

/** Where that cannot be said, it may. */
function names(path: string, journal: ListJournal): boolean {
  try {
    return readList(path)?.includes(journal.name) ?? false;
  } catch {
    return true;
  }
}

function readList(path: string): string | undefined {
  try {
    return readFileSync(path, 'utf8');
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return undefined;
    throw new ToolstackError('corrupt', `${path} cannot be read: ${(error as Error).message}`, {
      cause: error,
    });
  }
}

function parseList(path: string, text: string): Entry[] {
  const corrupt = (what: string): ToolstackError =>
    new ToolstackError('corrupt', `${path} is damaged (${what}); restore it from a backup`);
  let content: unknown;
  try {
    content = JSON.parse(text);
  } catch {
    throw corrupt('not JSON');
  }
  if (typeof content !== 'object' || content === null || Array.isArray(content))
    throw corrupt('not an object');
  const { sha256, ...signed } = content as Record<string, unknown>;
  const { format, vtpms, journal } = signed;
  if (typeof format === 'number' && format > LIST_FORMAT) {
    throw new ToolstackError(
      'newer-format',
      `${path} has format ${format}, this version knows ${LIST_FORMAT}; use the newer vtpm-supervisord`,
    );
  }
  if (!Number.isInteger(format) || Number(format) < 1) throw corrupt('no known format number');
  const hasJournal = Number(format) >= 3;
  if (!Array.isArray(vtpms) || sha256 !== digestOf(hasJournal ? signed : vtpms)) {
    throw corrupt('its digest does not match');
  }
  const known = vtpms.map((item, index) => {
    try {
      return parseEntry(item, Number(format));
    } catch (error) {
      throw corrupt(`entry ${index}: ${(error as Error).message}`);
    }
  });
  let entries = known;
  try {
    if (hasJournal && journal !== null) entries = changed(known, ListJournal.read(path, journal));
  } catch (error) {
    throw corrupt(`its journal: ${(error as Error).message}`);
  }
  if (new Set(entries.flatMap(({ id, name }) => [id, `name ${name}`])).size !== 2 * entries.length)
    throw corrupt('an id or a name stands there twice');
  return entries;
}

/** @throws Error */
function changed(entries: readonly Entry[], changes: readonly Change[]): Entry[] {
  const all = new Map(entries.map((entry) => [entry.id, entry]));
  for (const change of changes) {
    if ('set' in change) {
      const entry = parseEntry(change.set);
      all.set(entry.id, entry);
    } else if (typeof change.remove !== 'string' || !all.delete(change.remove)) {
      throw new Error('it removes a vTPM that there is not');
    }
  }
  return [...all.values()];
}
