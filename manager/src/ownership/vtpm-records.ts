import { uuidToBytes } from 'vtpm-proto';
import type { KeyHierarchy } from '../keys/index.js';
import { decodeRecord, encodeRecord, type VtpmRecord, vtpmKey } from '../records/index.js';
import type { AnchoredStore, Counting } from '../store/anchored-store.js';
import type { Census } from './census.js';

/** The record as it was last read or written, with the store's version of it. */
export interface HeldRecord {
  readonly version: number;
  readonly record: VtpmRecord;
}

/** The vTPMs' records in the store, verified as they are read. */
export class VtpmRecords {
  constructor(
    private readonly parts: {
      readonly keys: KeyHierarchy;
      readonly store: AnchoredStore;
      readonly census: Census;
    },
  ) {}

  /** @throws ManagerError `newer-format`, `store-corrupt` */
  async read(vtpmUuid: string): Promise<HeldRecord | undefined> {
    const entry = await this.parts.store.read(vtpmKey(vtpmUuid));
    return (
      entry && {
        version: entry.version,
        record: decodeRecord(this.parts.keys, uuidToBytes(vtpmUuid), entry.value),
      }
    );
  }

  /** @param found as it was read or written before: read again only where something was written since @throws as `read` */
  async newest(vtpmUuid: string, found: HeldRecord | undefined): Promise<HeldRecord | undefined> {
    const isNewest = this.parts.store.version(vtpmKey(vtpmUuid)) === (found?.version ?? 0);
    return isNewest ? found : await this.read(vtpmUuid);
  }

  /** @param held what it replaces */
  async write(
    vtpmUuid: string,
    held: HeldRecord | undefined,
    record: VtpmRecord,
    counting?: Counting,
  ): Promise<HeldRecord> {
    const bytes = encodeRecord(this.parts.keys, record);
    const version = await this.parts.store.write(vtpmKey(vtpmUuid), held?.version ?? 0, bytes, counting);
    this.parts.census.note(held?.record.header, record.header);
    return { version, record };
  }
}
