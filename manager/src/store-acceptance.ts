import { existsSync, readdirSync, renameSync } from 'node:fs';
import { basename, dirname, join } from 'node:path';
import { type Logger, type Paths, syncDirectory } from 'vtpm-common';
import { uuidToBytes, uuidToText } from 'vtpm-proto';
import { noteDecision, type Told } from './arrivals-log.js';
import {
  type AuditEntry,
  type AuditHead,
  type AuditLog,
  allOf,
  createAuditLog,
  EMPTY_HEAD,
  openAuditLog,
  refuseFlaw,
  verifyAudit,
} from './audit/index.js';
import { asItLeft, type Leave, noteDeparture } from './departures-log.js';
import { ManagerError } from './error.js';
import type { KeyHierarchy } from './keys/index.js';
import { isPromisesKey, keepPromises } from './ownership/abort-promises.js';
import { ACCEPTANCE_KEY, acceptanceRecord } from './ownership/acceptance.js';
import { decodeRecord, encodeRecord, type Mark, rekey, resume, vtpmOfKey } from './records/index.js';
import type { AnchorCounter } from './root-tpm/index.js';
import { auditKeys } from './service.js';
import {
  adoptStore,
  examineStore,
  overwrite,
  readAnchor,
  type StateStore,
  type StoreEntry,
} from './store/index.js';
import { rekeyTrust, TRUST_KEY } from './trust/trust-configuration.js';

export interface AcceptOptions {
  readonly store: StateStore;
  readonly keys: KeyHierarchy;
  readonly paths: Paths['manager'];
  readonly log: Logger;
  /** That every live vTPM bears from now on. */
  readonly mark: Mark;
}

/** A vTPM as the disk has it. */
export interface RecoveredVtpm {
  readonly id: string;
  readonly generation: bigint;
  /** On which it goes on, once it is done: none of the lost ones is used again. */
  readonly nextGeneration: bigint | undefined;
  readonly epoch: bigint;
  /** Unix milliseconds. */
  readonly savedAt: bigint;
  /** The newest generation that the audit log knows of, where that is more. */
  readonly lostAtLeast: bigint | undefined;
}

export interface Survey {
  /** Why a start refuses the store; undefined where it does not. */
  readonly refusal: string | undefined;
  readonly vtpms: readonly RecoveredVtpm[];
}

/**
 * What accepting the store would bring back. Changes nothing.
 * @param counted what the TPM shows; undefined where its counter is gone
 */
export async function surveyStore(options: AcceptOptions, counted: bigint | undefined): Promise<Survey> {
  const { store, keys, paths } = options;
  const found: Omit<RecoveredVtpm, 'lostAtLeast'>[] = [];
  const verdict = await examineStore(store, keys, (entry) => {
    const record = recordOf(keys, entry);
    if (record?.header.kind !== 'LIVE') return;
    const { vtpmUuid, generation, epoch, savedAt } = record.header;
    found.push({
      id: uuidToText(vtpmUuid),
      generation,
      nextGeneration: undefined,
      epoch,
      savedAt,
    });
  });
  const known = new Map<string, bigint>();
  let auditFlaw: string | undefined;
  try {
    // Not opened: that would cut off an end that looks torn, and nothing is to be changed yet.
    const report = await verifyAudit(paths.audit, auditKeys(keys), verdict.anchor?.audit ?? EMPTY_HEAD);
    refuseFlaw(report);
    for await (const entries of allOf(paths.audit, report.head)) {
      for (const { vtpm, generation = 0n } of entries) {
        if (vtpm !== undefined && generation > (known.get(vtpm) ?? 0n)) known.set(vtpm, generation);
      }
    }
  } catch (error) {
    if (!(error instanceof ManagerError)) throw error;
    auditFlaw = error.message;
  }
  const vtpms = found.map((vtpm) => {
    const newest = known.get(vtpm.id) ?? 0n;
    return { ...vtpm, lostAtLeast: newest > vtpm.generation ? newest : undefined };
  });
  return { refusal: refusalOf(verdict, counted) ?? auditFlaw, vtpms };
}

function refusalOf(
  { anchor, isWhole }: Awaited<ReturnType<typeof examineStore>>,
  counted: bigint | undefined,
): string | undefined {
  if (!anchor) return 'the store has no anchor, or one that is not of this installation';
  if (!isWhole) return 'the records are not those that the anchor speaks of';
  if (counted === undefined) return "the TPM's counter is gone";
  const { counter } = anchor;
  if (counter === counted || counter === counted + 1n) return undefined;
  return `the store's anchor says ${counter}, the TPM has counted to ${counted}`;
}

/**
 * Takes the store for the newest, after `spoilAnchor`: every live vTPM is marked, loses its session, and goes on with a
 * generation that none of the lost ones can have had; everything is put under the current generation of the root key. One
 * that left since, as the audit log says, is on its way again: its destination says what became of it. One that was given
 * up since to a host that rescued it is a tombstone again. Of what was on its way here no ABORT is said from now on, except
 * where the log has it: it may have been committed.
 * @returns that generation, by the id of each vTPM that lives
 */
export async function acceptStore(
  options: AcceptOptions,
  counter: AnchorCounter,
): Promise<ReadonlyMap<string, bigint>> {
  const { store, keys, paths, log, mark } = options;
  const audit = await openOrBeginAudit(options);
  try {
    const action = mark === 'recovered' ? 'recover' : 'accept-rollback';
    const actor = { uid: process.getuid?.() ?? 0 };
    // The log may be newer than the store: what it says has left must not come to life here again. All of it: an intention
    // may be in the log before the store's anchor, and lines that a peer causes must not push one out.
    const { left, told } = await historyIn(allOf(paths.audit, audit.head));
    await audit.append({ actor, action, verdict: 'intended' });
    const events: { vtpm: string; generation: bigint; epoch: bigint; facts?: { rescuer: string } }[] = [];
    const living = new Map<string, bigint>();
    const now = BigInt(Date.now());
    const isAborted = (source: string, migration: string): boolean =>
      told.get(`${source}/${migration}`) === 'ABORT';
    const change = (entry: StoreEntry, count: bigint): Uint8Array | undefined => {
      if (entry.key === TRUST_KEY) return rekeyTrust(keys, entry.value, mark === 'recovered');
      if (isPromisesKey(entry.key)) return keepPromises(keys, entry.key, entry.value, isAborted);
      const record = recordOf(keys, entry);
      if (!record) return undefined;
      const wasLive = record.header.kind === 'LIVE';
      if (!wasLive && record.header.keyId === keys.current.keyId) return undefined;
      const known = asItLeft(record, left, now);
      const isLive = known.header.kind === 'LIVE';
      const next = rekey(keys, isLive ? resume(known, mark, count) : known);
      const { vtpmUuid, generation, epoch, departure } = next.header;
      const vtpm = uuidToText(vtpmUuid);
      if (isLive) {
        living.set(vtpm, generation);
        events.push({ vtpm, generation, epoch });
      } else if (wasLive && departure) {
        const rescuer = Buffer.from(departure.destination).toString('hex');
        events.push({ vtpm, generation, epoch, facts: { rescuer } });
        log.warn({ vtpm, rescuer }, 'this vTPM was rescued by another host before; it stays there');
      }
      return encodeRecord(keys, next);
    };
    let head: AuditHead = audit.head;
    const announce = async (): Promise<void> => {
      await Promise.all(events.map((event) => audit.append({ actor, action, verdict: 'done', ...event })));
      head = audit.head;
    };
    await overwrite(store, ACCEPTANCE_KEY, acceptanceRecord(Number(now)));
    await adoptStore(store, keys, counter, () => head, change, announce);
    return living;
  } finally {
    await audit.close();
  }
}

async function historyIn(
  log: AsyncIterable<readonly AuditEntry[]>,
): Promise<{ left: ReadonlyMap<string, Leave>; told: Told }> {
  const left = new Map<string, Leave>();
  const told: Told = new Map();
  for await (const entries of log) {
    for (const entry of entries) {
      noteDeparture(left, entry);
      noteDecision(told, entry);
    }
  }
  return { left, told };
}

function recordOf(keys: KeyHierarchy, { key, value }: StoreEntry) {
  const id = vtpmOfKey(key);
  return id === undefined ? undefined : decodeRecord(keys, uuidToBytes(id), value);
}

/** A log that does not verify is put aside whole, and a new chain begins that says so. */
async function openOrBeginAudit({ store, keys, paths, log }: AcceptOptions): Promise<AuditLog> {
  const anchor = await readAnchor(store, keys);
  try {
    return (await openAuditLog(paths.audit, auditKeys(keys), anchor?.audit ?? EMPTY_HEAD)).log;
  } catch (error) {
    if (!(error instanceof ManagerError)) throw error;
    const aside = putAside(paths.audit);
    log.warn(
      { reason: error.code, aside },
      'the audit log does not verify; it was put aside, and a new one begins',
    );
    const { keyId: id, auditKey: key } = keys.current;
    const begun = await createAuditLog(paths.audit, { id, key });
    await begun.append({
      actor: 'manager',
      action: 'accept-rollback',
      verdict: 'intended',
      reason: { code: error.code, message: error.message },
      facts: { putAside: aside },
    });
    return begun;
  }
}

/** @returns the ending that the files have now */
function putAside(path: string): string {
  const directory = dirname(path);
  const ending = `.aside-${new Date().toISOString().replaceAll(':', '')}`;
  const stem = basename(path, '.log');
  for (const name of existsSync(directory) ? readdirSync(directory) : []) {
    const isSegment = name === basename(path) || (name.startsWith(`${stem}.`) && name.endsWith('.log'));
    if (isSegment) renameSync(join(directory, name), join(directory, name + ending));
  }
  syncDirectory(directory);
  return ending;
}
