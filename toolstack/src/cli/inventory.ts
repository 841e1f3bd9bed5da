import { ToolstackError } from '../error.js';
import type { Erasure, ManagerApi, ManagerVtpm } from './manager-api.js';
import type { SupervisorApi, SupervisorVtpm } from './supervisor-api.js';

/**
 * `no-name`: the manager keeps it live, the supervisor does not know it. `no-state`: the supervisor has run it and
 * the manager has no state of it. `retired`: the manager retired it and the supervisor still lists it.
 */
export type Orphan = 'no-name' | 'no-state' | 'retired';

/** One vTPM as both daemons see it. The supervisor owns name and desired state, the manager the saved state. */
export interface Entry {
  readonly id: string;
  readonly name: string | null;
  readonly vmUuid: string;
  /** As the supervisor says; where it does not know the vTPM, whether the manager retired it or gave it away. */
  readonly state: SupervisorVtpm['state'] | 'retired' | 'unknown';
  /** Of one that has moved. */
  readonly movedTo: string | null;
  /** ISO 8601. */
  readonly movedAt: string | null;
  readonly reason: string | null;
  readonly kind: ManagerVtpm['kind'] | null;
  readonly generation: number | null;
  readonly epoch: number | null;
  readonly vmRunId: string | null;
  readonly isolation: string | null;
  readonly autostart: boolean | null;
  readonly startup: string | null;
  readonly doors: readonly string[] | null;
  readonly stateBlobs: string | null;
  /** `uid:gid` in numbers; null: the supervisor's user. */
  readonly socketOwner: string | null;
  readonly socketMode: string | null;
  readonly dropin: SupervisorVtpm['dropin'] | null;
  readonly worker: {
    readonly pid: number;
    readonly isolation: string;
    readonly profile: string;
    readonly layers: readonly string[];
    readonly waived: readonly string[];
  } | null;
  readonly vmm: SupervisorVtpm['vmm'];
  readonly sockets: SupervisorVtpm['sockets'];
  readonly savedBytes: number | null;
  readonly savedAt: string | null;
  readonly createdAt: string | null;
  readonly marks: readonly string[];
  /** A reference to its state is out; null: not known. */
  readonly isSuspended: boolean | null;
  readonly libtpmsVersion: string | null;
  /** Of a retired one. */
  readonly erasure: Erasure | null;
  readonly orphan: Orphan | null;
}

export interface Inventory {
  readonly entries: Entry[];
  /** What could not be asked; orphans are then not told apart. */
  readonly missing: ToolstackError[];
}

/** Asks both daemons. @throws ToolstackError only when neither answers */
export async function takeInventory(supervisor: SupervisorApi, manager: ManagerApi): Promise<Inventory> {
  let known = await attempt(() => supervisor.vtpms());
  const saved = await attempt(() => manager.vtpms());
  if (known instanceof ToolstackError && saved instanceof ToolstackError) throw known;
  const records = saved instanceof ToolstackError ? [] : saved;
  if (hasNameless(records, known)) {
    // Perhaps made between the two answers: then it is no orphan.
    known = await attempt(() => supervisor.vtpms());
  }
  const vtpms = known instanceof ToolstackError ? [] : known;
  const byId = new Map(records.map((record) => [record.id, record]));
  const entries = vtpms.map((vtpm) => join(vtpm, byId.get(vtpm.id), !(saved instanceof ToolstackError)));
  const listed = new Set(vtpms.map((vtpm) => vtpm.id));
  for (const record of records) {
    if (record.kind === 'live' && !listed.has(record.id)) {
      entries.push(nameless(record, !(known instanceof ToolstackError)));
    }
  }
  return { entries, missing: [known, saved].filter((answer) => answer instanceof ToolstackError) };
}

function hasNameless(
  records: readonly ManagerVtpm[],
  known: readonly SupervisorVtpm[] | ToolstackError,
): boolean {
  if (known instanceof ToolstackError) return false;
  const listed = new Set(known.map((vtpm) => vtpm.id));
  return records.some((record) => record.kind === 'live' && !listed.has(record.id));
}

/**
 * One vTPM by name or id, as far as both daemons can be asked.
 * @throws ToolstackError `unknown-vtpm` where neither knows it
 */
export async function findEntry(
  nameOrId: string,
  supervisor: SupervisorApi,
  manager: ManagerApi,
): Promise<{ entry: Entry; missing: ToolstackError[] }> {
  const known = await attempt(() => supervisor.vtpm(nameOrId));
  if (known instanceof ToolstackError) {
    if (known.code !== 'unknown-vtpm' || !isUuid(nameOrId)) throw known;
    const record = await manager.vtpm(nameOrId);
    return { entry: nameless(record, true), missing: [] };
  }
  const saved = await attempt(() => manager.vtpm(known.id));
  if (!(saved instanceof ToolstackError)) return { entry: join(known, saved, true), missing: [] };
  if (saved.code === 'unknown-vtpm') return { entry: join(known, undefined, true), missing: [] };
  return { entry: join(known, undefined, false), missing: [saved] };
}

const NO_SOCKETS: Entry['sockets'] = { tpm: null, tcti: null, control: null, mssim: null, ring: null };

/** As the supervisor has it. Upper case is refused so that two names never differ by that alone. */
const NAME = /^[a-z0-9][a-z0-9._-]{0,62}$/;

/** Whether a vTPM may be called so; an id is told from a name by its form. */
export function isVtpmName(text: string): boolean {
  return NAME.test(text) && !isUuid(text);
}

export function isUuid(text: string): boolean {
  return /^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$/i.test(text);
}

async function attempt<T>(ask: () => Promise<T>): Promise<T | ToolstackError> {
  try {
    return await ask();
  } catch (error) {
    return ToolstackError.from(error);
  }
}

function join(vtpm: SupervisorVtpm, record: ManagerVtpm | undefined, isManagerAsked: boolean): Entry {
  const wasRun = vtpm.state === 'running' || (vtpm.epoch ?? 0) > 0;
  const orphan: Orphan | null =
    record?.kind === 'retired' ? 'retired' : isManagerAsked && !record && wasRun ? 'no-state' : null;
  // It hears of that from the manager, perhaps a moment later.
  const state = record?.kind === 'moved' && vtpm.worker === null ? 'moved' : vtpm.state;
  return {
    id: vtpm.id,
    name: vtpm.name,
    vmUuid: vtpm.vmUuid,
    state,
    movedTo: record?.movedTo ?? vtpm.movedTo ?? null,
    movedAt: state === 'moved' ? (vtpm.movedAt ?? record?.erasure?.retiredAt ?? null) : null,
    reason: vtpm.reason ?? null,
    kind: record?.kind ?? null,
    // Known to the manager as never saved is 0; not known because it could not be asked is null.
    generation: record?.generation ?? (isManagerAsked ? 0 : null),
    epoch: record?.epoch ?? vtpm.epoch ?? (isManagerAsked ? 0 : null),
    vmRunId: vtpm.vmRunId,
    isolation: vtpm.isolation,
    autostart: vtpm.autostart,
    startup: vtpm.startup,
    doors: vtpm.doors ?? null,
    stateBlobs: vtpm.stateBlobs ?? null,
    socketOwner: vtpm.socketOwner ?? null,
    dropin: vtpm.dropin ?? null,
    socketMode: vtpm.socketMode ?? null,
    worker: vtpm.worker,
    vmm: vtpm.vmm ?? null,
    sockets: state === 'moved' ? NO_SOCKETS : vtpm.sockets,
    savedBytes: record?.savedBytes ?? null,
    savedAt: record?.savedAt ?? null,
    createdAt: record?.createdAt ?? null,
    marks: record?.marks ?? [],
    isSuspended: record?.isSuspended ?? null,
    libtpmsVersion: record?.libtpmsVersion ?? null,
    erasure: record?.erasure ?? null,
    orphan,
  };
}

function nameless(record: ManagerVtpm, isSupervisorAsked: boolean): Entry {
  return {
    id: record.id,
    name: null,
    vmUuid: record.vmUuid,
    state: record.kind === 'live' ? 'unknown' : record.kind,
    movedTo: record.movedTo ?? null,
    movedAt: record.kind === 'moved' ? (record.erasure?.retiredAt ?? null) : null,
    reason: null,
    kind: record.kind,
    generation: record.generation,
    epoch: record.epoch,
    vmRunId: null,
    isolation: null,
    autostart: null,
    startup: null,
    doors: null,
    stateBlobs: null,
    socketOwner: null,
    dropin: null,
    socketMode: null,
    worker: null,
    vmm: null,
    sockets: NO_SOCKETS,
    savedBytes: record.savedBytes,
    savedAt: record.savedAt,
    createdAt: record.createdAt,
    marks: record.marks,
    isSuspended: record.isSuspended ?? null,
    libtpmsVersion: record.libtpmsVersion,
    erasure: record.erasure,
    orphan: isSupervisorAsked && record.kind === 'live' ? 'no-name' : null,
  };
}
