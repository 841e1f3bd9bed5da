import type { AnchoredStore } from '../store/anchored-store.js';

/** The record of the store that says so. */
export const ACCEPTANCE_KEY = 'acceptance';

/**
 * That a store was taken for the newest without being it: an old one that was accepted, or one made from a backup. What this
 * host decided before may be missing in it.
 * @param now Unix milliseconds
 */
export function acceptanceRecord(now: number): Buffer {
  const value = Buffer.alloc(8);
  value.writeBigUInt64BE(BigInt(now));
  return value;
}

/** When that was, the last time; undefined where it never was. */
export async function acceptedAt(store: Pick<AnchoredStore, 'read'>): Promise<Date | undefined> {
  const entry = await store.read(ACCEPTANCE_KEY);
  return entry && new Date(Number(entry.value.readBigUInt64BE()));
}
