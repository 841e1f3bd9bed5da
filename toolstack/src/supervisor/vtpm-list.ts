import { createHash } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { writeFileDurably } from 'vtpm-common';
import { ToolstackError } from '../error.js';
import { ENTRY_FORMAT, type Entry, parseEntry } from './entry.js';

/** Format number of the file; a newer one is refused by name, those before it are still read. */
export const LIST_FORMAT = ENTRY_FORMAT;

/**
 * The vTPMs of this host as the supervisor knows them. Every change is durable when the method returns. A file that
 * cannot be read is an error, never an empty list (I-9).
 */
export class VtpmList {
  readonly #path: string;
  readonly #entries = new Map<string, Entry>();

  private constructor(path: string, entries: readonly Entry[]) {
    this.#path = path;
    for (const entry of entries) this.#entries.set(entry.id, entry);
  }

  /** Makes the file of a first start. */
  static create(path: string): VtpmList {
    const list = new VtpmList(path, []);
    list.#write(list.#entries);
    return list;
  }

  /**
   * @returns undefined where there is no file: whether that may be, only the caller knows
   * @throws ToolstackError `corrupt` | `newer-format`
   */
  static open(path: string): VtpmList | undefined {
    let text: string;
    try {
      text = readFileSync(path, 'utf8');
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code === 'ENOENT') return undefined;
      throw new ToolstackError('corrupt', `${path} cannot be read: ${(error as Error).message}`, {
        cause: error,
      });
    }
    return new VtpmList(path, parseList(path, text));
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
    this.#replace((entries) => entries.set(entry.id, entry));
  }

  update(id: string, change: Partial<Omit<Entry, 'id' | 'name'>>): Entry {
    const old = this.#entries.get(id);
    if (!old) throw new ToolstackError('unknown-vtpm', `there is no vTPM ${id}`);
    const entry = { ...old, ...change };
    this.#replace((entries) => entries.set(id, entry));
    return entry;
  }

  remove(id: string): void {
    this.#replace((entries) => entries.delete(id));
  }

  /** Memory follows the disk: after a failed write the list is what it was. */
  #replace(change: (entries: Map<string, Entry>) => void): void {
    const next = new Map(this.#entries);
    change(next);
    this.#write(next);
    this.#entries.clear();
    for (const [id, entry] of next) this.#entries.set(id, entry);
  }

  #write(entries: ReadonlyMap<string, Entry>): void {
    const vtpms = [...entries.values()];
    const content = { format: LIST_FORMAT, sha256: digestOf(vtpms), vtpms };
    writeFileDurably(this.#path, `${JSON.stringify(content, null, 2)}\n`);
  }
}

/** A flipped bit inside a name or a signature leaves valid JSON, so the content carries its digest. */
function digestOf(vtpms: unknown): string {
  return createHash('sha256').update(JSON.stringify(vtpms)).digest('hex');
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
  const { format, sha256, vtpms } = content as Record<string, unknown>;
  if (typeof format === 'number' && format > LIST_FORMAT) {
    throw new ToolstackError(
      'newer-format',
      `${path} has format ${format}, this version knows ${LIST_FORMAT}; use the newer vtpm-supervisord`,
    );
  }
  if (!Number.isInteger(format) || Number(format) < 1) throw corrupt('no known format number');
  if (!Array.isArray(vtpms) || sha256 !== digestOf(vtpms)) throw corrupt('its digest does not match');
  const entries = vtpms.map((item, index) => {
    try {
      return parseEntry(item, Number(format));
    } catch (error) {
      throw corrupt(`entry ${index}: ${(error as Error).message}`);
    }
  });
  if (new Set(entries.flatMap(({ id, name }) => [id, `name ${name}`])).size !== 2 * entries.length)
    throw corrupt('an id or a name stands there twice');
  return entries;
}
