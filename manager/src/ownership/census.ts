import { type RecordHeader, uuidToText } from 'vtpm-proto';
import { glance, isDeparting, vtpmOfKey } from '../records/index.js';
import type { StoreEntry } from '../store/index.js';

type RecordKind = RecordHeader['kind'];

/** Committed here, of which the source has not said yet that its tombstone is written. */
export interface UnsettledArrival {
  readonly vtpmUuid: string;
  readonly migrationId: Uint8Array;
  readonly source: Uint8Array;
}

/** What there is, noted once when the store is read and then kept up: nobody reads all records to know. */
export class Census {
  readonly #counts: Record<RecordKind, number> = { LIVE: 0, RETIRED: 0, MOVED: 0 };
  readonly #departing = new Set<string>();
  readonly #rescued = new Set<string>();
  /** By migration id, in hex. */
  readonly #unsettled = new Map<string, UnsettledArrival>();

  get live(): number {
    return this.#counts.LIVE;
  }

  get retired(): number {
    return this.#counts.RETIRED;
  }

  get moved(): number {
    return this.#counts.MOVED;
  }

  /** vTPMs of which a destination has to say what became of them. */
  get departing(): string[] {
    return [...this.#departing];
  }

  /** vTPMs of which the host that was dead has to hear still. */
  get rescued(): string[] {
    return [...this.#rescued];
  }

  /** The vTPM that was committed here by a migration whose source has not settled it. @param migrationId in hex */
  committedBy(migrationId: string): string | undefined {
    return this.#unsettled.get(migrationId)?.vtpmUuid;
  }

  get unsettled(): UnsettledArrival[] {
    return [...this.#unsettled.values()];
  }

  /** A record of the store, of a vTPM or not, while it is opened. It is verified when it is read again. */
  take({ key, value }: Pick<StoreEntry, 'key' | 'value'>): void {
    const id = vtpmOfKey(key);
    if (id === undefined) return;
    const header = glance(value);
    this.#counts[header?.kind ?? 'LIVE'] += 1;
    if (header) this.#noteMigrations(id, undefined, header);
  }

  /** A record was written. @param before undefined where there was none */
  note(before: RecordHeader | undefined, after: RecordHeader): void {
    if (before) this.#counts[before.kind] -= 1;
    this.#counts[after.kind] += 1;
    this.#noteMigrations(uuidToText(after.vtpmUuid), before, after);
  }

  #noteMigrations(id: string, before: RecordHeader | undefined, after: RecordHeader): void {
    for (const { migrationId } of before?.unsettled ?? []) this.#unsettled.delete(hex(migrationId));
    for (const { migrationId, source } of after.unsettled) {
      // Copies: the rest of the record is let go.
      const arrival = { vtpmUuid: id, migrationId: Buffer.from(migrationId), source: Buffer.from(source) };
      this.#unsettled.set(hex(migrationId), arrival);
    }
    if (isDeparting(after)) this.#departing.add(id);
    else this.#departing.delete(id);
    if (after.rescues.length > 0) this.#rescued.add(id);
    else this.#rescued.delete(id);
  }
}

function hex(bytes: Uint8Array): string {
  return Buffer.from(bytes).toString('hex');
}
