import { type Departure, type MigrateMode, uuidToText } from 'vtpm-proto';
import type { AuditEntry } from './audit/index.js';
import { movedAway, NO_MIGRATION, type VtpmRecord } from './records/index.js';

const MODES: readonly MigrateMode[] = ['OFFLINE', 'LIVE', 'VMM'];

/** How a vTPM left this host. */
export interface Leave {
  readonly departure: Departure;
  /** Another host rescued it and this one gave it up: there is nothing to ask. */
  readonly isGivenUp: boolean;
}

/**
 * Follows vTPMs that left this host, as its audit log says, and of which it does not say that they stayed or came back.
 * @param left by vTPM
 * @param entry the one after the last that was noted
 */
export function noteDeparture(left: Map<string, Leave>, entry: AuditEntry): void {
  const { action, verdict, vtpm } = entry;
  if (vtpm === undefined) return;
  const isDone = verdict === 'done';
  const { migration, to, from } = entry.facts ?? {};
  const leave = leaveOf(entry);
  if (leave) left.set(vtpm, leave);
  const isSame = hex(left.get(vtpm)?.departure.migrationId) === migration;
  // One that was taken back without the word of its destination has not stayed: the notice for that host is lost with the store,
  // and its word, or another statement, is needed again.
  const hasStayed = action === 'migrate-abort' && isDone && to !== undefined && isSame;
  // The intention is in the log before anything stops, and may have come to nothing.
  const hasEnded = action === 'migrate-out' && verdict === 'failed' && isSame;
  const hasCome = action === 'migrate-commit' && isDone && from !== undefined;
  if (hasStayed || hasEnded || hasCome) left.delete(vtpm);
}

/**
 * An old record of a vTPM that left since: nobody loads it before its destination has said what it decided, and never
 * where this host gave it up; its tombstone is in the place of the record then.
 * @param left as `noteDeparture` has it
 * @param now Unix milliseconds
 */
export function asItLeft(record: VtpmRecord, left: ReadonlyMap<string, Leave>, now: bigint): VtpmRecord {
  const { header, parts } = record;
  const leave = left.get(uuidToText(header.vtpmUuid));
  if (header.kind !== 'LIVE' || !leave) return record;
  const { departure, isGivenUp } = leave;
  // It stayed, or came back: that has an epoch of its own.
  if (header.epoch > departure.epoch) return record;
  if (isGivenUp) return movedAway(record, departure, now);
  return header.departure ? record : { header: { ...header, departure }, parts };
}

function leaveOf(entry: AuditEntry): Leave | undefined {
  const isGivenUp = entry.action === 'rescue' && entry.verdict !== 'refused';
  if (!isGivenUp && entry.action !== 'freeze') return undefined;
  const departure = isGivenUp ? rescueOf(entry) : departureOf(entry);
  return departure && { departure, isGivenUp };
}

/** A rescue of this host's own names no rescuer. That it was only intended is enough: the other host has it. */
function rescueOf({ time, epoch, generation, facts }: AuditEntry): Departure | undefined {
  const rescuer = facts?.rescuer;
  if (epoch === undefined || generation === undefined || !isHex(rescuer, 32)) return undefined;
  return {
    migrationId: NO_MIGRATION,
    destination: Buffer.from(rescuer, 'hex'),
    at: BigInt(Date.parse(time)),
    mode: 'OFFLINE',
    epoch,
    generation,
  };
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
