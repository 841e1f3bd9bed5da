import { type Departure, type MigrateMode, uuidToText } from 'vtpm-proto';
import type { AuditEntry } from './audit/index.js';
import type { VtpmRecord } from './records/index.js';

const MODES: readonly MigrateMode[] = ['OFFLINE', 'LIVE', 'VMM'];

/**
 * vTPMs that left this host, as its audit log says, and of which it does not say that they stayed or came back. By vTPM.
 * @param entries the oldest first
 */
export function departuresIn(entries: readonly AuditEntry[]): ReadonlyMap<string, Departure> {
  const left = new Map<string, Departure>();
  for (const entry of entries) {
    const { action, verdict, vtpm } = entry;
    if (vtpm === undefined) continue;
    const isDone = verdict === 'done';
    const { migration, to, from } = entry.facts ?? {};
    const departure = action === 'freeze' ? departureOf(entry) : undefined;
    if (departure) left.set(vtpm, departure);
    const isSame = hex(left.get(vtpm)?.migrationId) === migration;
    const hasStayed = action === 'migrate-abort' && isDone && to !== undefined && isSame;
    // The intention is in the log before anything stops, and may have come to nothing.
    const hasEnded = action === 'migrate-out' && verdict === 'failed' && isSame;
    const hasCome = action === 'migrate-commit' && isDone && from !== undefined;
    if (hasStayed || hasEnded || hasCome) left.delete(vtpm);
  }
  return left;
}

/**
 * An old record of a vTPM that left since: nobody loads it before its destination has said what it decided.
 * @param left as `departuresIn` has it
 */
export function asItLeft(record: VtpmRecord, left: ReadonlyMap<string, Departure>): VtpmRecord {
  const { header, parts } = record;
  const departure = left.get(uuidToText(header.vtpmUuid));
  if (header.kind !== 'LIVE' || header.departure || !departure) return record;
  // It stayed, or came back: that has an epoch of its own.
  if (header.epoch > departure.epoch) return record;
  return { header: { ...header, departure }, parts };
}

function departureOf({ time, epoch, generation, facts }: AuditEntry): Departure | undefined {
  const { migration, to, mode } = facts ?? {};
  const known = MODES.find((name) => name === mode);
  if (!known || epoch === undefined || generation === undefined) return undefined;
  if (!isHex(migration, 16) || !isHex(to, 32)) return undefined;
  return {
    migrationId: Buffer.from(migration, 'hex'),
    destination: Buffer.from(to, 'hex'),
    at: BigInt(Date.parse(time)),
    mode: known,
    epoch,
    generation,
  };
}

function isHex(text: string | undefined, bytes: number): text is string {
  return text !== undefined && text.length === 2 * bytes && /^[0-9a-f]*$/.test(text);
}

function hex(bytes: Uint8Array | undefined): string | undefined {
  return bytes && Buffer.from(bytes).toString('hex');
}
