import type { ToolstackError } from '../../error.js';
import type { Context } from '../context.js';
import { exitStatus } from '../exit-status.js';
import { sayGeneration } from '../generation.js';
import { type Entry, findEntry, type Orphan, takeInventory } from '../inventory.js';
import type { Erasure } from '../manager-api.js';
import { bytes, fields, PLAIN_STATE, table, time } from '../output.js';
import type { VmmStatus } from '../supervisor-api.js';

const ORPHANS: Readonly<Record<Orphan, string>> = {
  'no-name':
    'orphan: the manager keeps its state, the supervisor does not know it; vtpmctl delete ID retires it',
  'no-state': 'orphan: it has run, but the manager has no state of it; vtpmctl delete removes it',
  retired: 'orphan: the manager retired it; vtpmctl delete removes it',
};

/** What stays visible for ever. */
const MARKS: Readonly<Record<string, string>> = {
  'rolled-back': 'rolled back: an old state was accepted as the newest, the saves after it are lost',
  recovered:
    'recovered: it was opened with the recovery key, and nothing says whether this was its newest state',
  restored: 'restored: its state was taken from a backup, the saves after it are lost',
  rescued: 'rescued: its host was dead, its state was taken from a backup, the saves after it are lost',
  'plain-export':
    'plain export: its whole state was given out in the clear, and copies of it may be anywhere',
};

/** @returns the exit status: what could be learnt is shown even where one of the daemons does not answer */
export async function list({ supervisor, manager, output }: Context): Promise<number> {
  const { entries, missing } = await takeInventory(supervisor, manager);
  const rows = entries.map((entry) => [
    entry.name ?? '-',
    entry.id,
    entry.state,
    entry.generation === null ? '-' : sayGeneration(entry.generation),
    bytes(entry.savedBytes),
    time(entry.savedAt),
    entry.marks.join(', ') || '-',
    note(entry),
  ]);
  output.result(
    { vtpms: entries, missing: missing.map(({ code, message }) => ({ code, message })) },
    rows.length === 0
      ? 'no vTPMs; make one with: vtpmctl create NAME'
      : table(['NAME', 'ID', 'STATE', 'GENERATION', 'SIZE', 'SAVED', 'MARKS', ''], rows),
  );
  return sayMissing(missing, output);
}

/** @returns the exit status, as `list` */
export async function show(nameOrId: string, { supervisor, manager, output }: Context): Promise<number> {
  const { entry, missing } = await findEntry(nameOrId, supervisor, manager);
  output.result(
    entry,
    fields([
      ['name', entry.name ?? '-'],
      ['id', entry.id],
      ['VM', entry.vmUuid],
      ['state', entry.state],
      ['note', note(entry)],
      ['since', entry.movedAt && time(entry.movedAt)],
      ['VM run', entry.vmRunId],
      ['epoch', entry.epoch],
      ['generation', entry.generation === null ? null : sayGeneration(entry.generation)],
      ['saved', entry.savedAt === null ? null : `${time(entry.savedAt)}, ${bytes(entry.savedBytes)}`],
      ['created', entry.createdAt === null ? null : time(entry.createdAt)],
      ['libtpms', entry.libtpmsVersion],
      ...entry.marks.map((mark) => ['mark', MARKS[mark] ?? mark] as const),
      ['erased', entry.erasure && sayErasure(entry.erasure, entry.state === 'moved' ? 'moved' : 'retired')],
      ['isolation', entry.isolation],
      ['autostart', entry.autostart === null ? null : entry.autostart ? 'yes' : 'no'],
      ['startup', entry.startup],
      ['doors', entry.doors?.join(', ')],
      ['state blobs', entry.stateBlobs === 'plain' ? PLAIN_STATE : entry.stateBlobs],
      ['suspended', entry.isSuspended ? 'a reference to its state is out, and works once' : null],
      ['sockets', entry.socketOwner && `for ${entry.socketOwner}, mode ${entry.socketMode}`],
      ['drop-in', entry.dropin && `swtpm of user ${entry.dropin.uid}, token in ${entry.dropin.place}`],
      ['worker', entry.worker ? `process ${entry.worker.pid}` : null],
      ['VMM', entry.vmm && sayVmm(entry.vmm)],
      ['profile', entry.worker?.profile],
      ['layers', entry.worker?.layers.join(', ')],
      ['waived', entry.worker?.waived.join(', ') || null],
      ['tpm', entry.sockets.tpm],
      ['tcti', entry.sockets.tcti],
      ['control', entry.sockets.control],
      ['mssim', entry.sockets.mssim && `host=127.0.0.1,port=${entry.sockets.mssim}`],
      ['ring', entry.sockets.ring],
    ]),
  );
  return sayMissing(missing, output);
}

function note(entry: Entry): string {
  if (entry.orphan) return ORPHANS[entry.orphan];
  if (entry.state === 'moved') {
    const forget = entry.name === null ? '' : `; vtpmctl delete ${entry.name} forgets it here`;
    return `it lives on ${entry.movedTo ?? 'another host'}${forget}`;
  }
  if (entry.state === 'migrating') {
    return `nobody runs it until its migration is settled: vtpmctl migrate status ${entry.name}`;
  }
  if (entry.state === 'crashed') {
    return `${entry.reason ?? 'it ended'}; power its VM off, then: vtpmctl start ${entry.name}`;
  }
  if (entry.state === 'lost') {
    const again = entry.doors?.includes('control') ? '' : `, then: vtpmctl start ${entry.name}`;
    return `every command fails: ${entry.reason ?? 'its state is lost'}; reset its VM${again}`;
  }
  if (entry.reason) return entry.reason;
  return entry.generation === 0 && entry.state === 'stopped' ? 'never started' : '';
}

function sayVmm({ connected, power, bufferSize, locality }: VmmStatus): string {
  const who = connected ? 'connected' : 'not connected';
  return `${who}, TPM ${power}, buffer ${bufferSize} bytes, locality ${locality}`;
}

function sayMissing(missing: readonly ToolstackError[], output: Context['output']): number {
  for (const error of missing) output.note(`vtpmctl: incomplete: ${error.message}`);
  const first = missing[0];
  return first ? exitStatus(first.code) : 0;
}

/** @param what became of it here */
function sayErasure({ isDone, retiredAt, due }: Erasure, what: 'moved' | 'retired'): string {
  const since = `${what} ${time(retiredAt)}`;
  if (isDone) return `yes, ${since}: no old disk opens its state any more`;
  const when =
    due === null
      ? 'with the next vtpmctl platform rotate'
      : `at ${time(due)}, or now with vtpmctl platform rotate`;
  return `not yet, ${since}: an old disk still opens its state; that ends ${when}`;
}
