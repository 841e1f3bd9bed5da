import { ToolstackError } from '../../error.js';
import type { Context } from '../context.js';
import { EXIT } from '../exit-status.js';
import { readGivenFile } from '../given-files.js';
import { isUuid, isVtpmName } from '../inventory.js';
import type { Migration } from '../manager-api.js';
import { table, time } from '../output.js';
import { because } from './migrate.js';

/** Of a migration, what it means for who looks after the vTPM. @param isOver it has been somewhere else since */
function meaning({ role, state, peer }: Migration, name: string, isOver: boolean): string {
  switch (state) {
    case 'preparing':
      return role === 'source' ? 'it runs here; nothing was stopped yet' : 'it runs at the source';
    case 'departing':
      return `stopped here, its state goes to ${peer}`;
    case 'in-doubt':
      return role === 'source'
        ? `nobody runs it until ${peer} says what it decided; to ask: vtpmctl migrate resolve ${name}`
        : `${peer} has not said yet that it has given it up; it runs here`;
    case 'committed':
      if (isOver) return role === 'source' ? `it went to ${peer}` : 'it came here';
      return role === 'source' ? `it lives on ${peer}` : 'it lives here';
    case 'aborted':
      return role === 'source' ? 'it stayed here' : `it stayed on ${peer}`;
  }
}

interface Named extends Migration {
  readonly name: string | null;
  /** A later one took it elsewhere. */
  readonly isOver: boolean;
}

/** Those that are not settled, and those of the last time, the newest last. @returns the exit status: 0 where none is in doubt */
export async function migrateStatus(nameOrId: string | undefined, context: Context): Promise<number> {
  const all = await named(context);
  const shown = nameOrId === undefined ? all : all.filter(isOf(nameOrId));
  const rows = shown.map((migration) => [
    migration.name ?? migration.id,
    migration.role === 'source' ? `to ${migration.peer}` : `from ${migration.peer}`,
    migration.mode?.toLowerCase() ?? '-',
    migration.state,
    time(migration.begunAt),
    time(migration.since),
    sayMeaning(migration),
  ]);
  context.output.result(
    { migrations: shown.map((migration) => ({ ...migration, meaning: sayMeaning(migration) })) },
    rows.length === 0
      ? `no migration${nameOrId === undefined ? '' : ` of ${nameOrId}`} is under way or in doubt`
      : table(['NAME', 'HOST', 'MODE', 'STATE', 'BEGUN', 'SINCE', ''], rows),
  );
  return shown.some(isOpen) ? EXIT.failed : EXIT.ok;
}

export interface ResolveFlags {
  readonly fenced?: string;
}

/** Asks the destination, which alone decides, or takes the operator's word that it never will. @returns the exit status: 0 where it is known now what came of it */
export async function migrateResolve(
  nameOrId: string,
  { fenced }: ResolveFlags,
  context: Context,
): Promise<number> {
  const { output } = context;
  const fencing = fenced === undefined ? undefined : readGivenFile('--fenced', fenced).trim();
  const open = (await named(context)).filter(isOf(nameOrId)).find(isOpen);
  if (!open) {
    throw new ToolstackError(
      'unknown-migration',
      `no migration of ${nameOrId} is in doubt; vtpmctl migrate status shows what there is`,
    );
  }
  const { answer, takenBack, reason } = await ask(open, fencing, context);
  const asked: Named = { ...open, state: answer, ...reason };
  const said = takenBack ? TAKEN_BACK : sayMeaning(isOpen(asked) ? { ...asked, reason: null } : asked);
  output.result(
    { ...asked, takenBack, meaning: said },
    `${asked.name ?? asked.id}: ${asked.state}; ${said}${isOpen(asked) ? `\nwhy: ${asked.message}` : ''}`,
  );
  return isOpen(asked) ? EXIT.failed : EXIT.ok;
}

/** A destination that is silent leaves it as it is; why it is silent is what the operator can do something about. */
async function ask({ migration }: Migration, fencing: string | undefined, { manager }: Context) {
  try {
    const { verdict, takenBack } = await manager.resolve(migration, fencing);
    const known = { reason: null, message: null };
    return { answer: verdict === 'COMMIT' ? 'committed' : 'aborted', takenBack, reason: known } as const;
  } catch (caught) {
    const { code, message } = ToolstackError.from(caught);
    if (code !== 'in-doubt' && code !== 'manager-refused') throw caught;
    return { answer: 'in-doubt', takenBack: false, reason: { reason: code, message } } as const;
  }
}

const TAKEN_BACK =
  'taken back without the word of the other host: it goes on here from where it was frozen, and bears the mark "rescued" for ever';

/** @returns the exit status: 0 where it was cancelled */
export async function migrateCancel(nameOrId: string, { supervisor, output }: Context): Promise<number> {
  const { id, name } = await supervisor.vtpm(nameOrId);
  const cancelled = await supervisor.cancelMigration(id);
  output.result(
    { id, name, cancelled },
    cancelled
      ? `cancelled: ${name} stays here`
      : `too late: the state of ${name} is on its way, and only the other host can say whether it took it; vtpmctl migrate status ${name}`,
  );
  return cancelled ? EXIT.ok : EXIT.failed;
}

async function named({ manager, supervisor }: Context): Promise<Named[]> {
  const [migrations, vtpms] = await Promise.all([
    manager.migrations(),
    // Names are a help: without the supervisor the ids are shown.
    supervisor.vtpms().catch(() => []),
  ]);
  const names = new Map(vtpms.map(({ id, name }) => [id, name]));
  const latest = new Map(
    migrations.filter(({ state }) => state === 'committed').map(({ id, migration }) => [id, migration]),
  );
  return migrations.map(({ description, ...migration }) => ({
    ...migration,
    name: names.get(migration.id) ?? nameIn(description),
    isOver: migration.state === 'committed' && latest.get(migration.id) !== migration.migration,
  }));
}

/** Of one that has no entry here any more, or none yet: what the host it comes from calls it. */
function nameIn(description: string | undefined): string | null {
  try {
    const { name } = JSON.parse(description ?? '{}') as { name?: unknown };
    return typeof name === 'string' && isVtpmName(name) ? name : null;
  } catch {
    return null;
  }
}

function isOf(nameOrId: string): (migration: Named) => boolean {
  const id = nameOrId.toLowerCase();
  if (isUuid(nameOrId)) return (migration) => migration.id === id;
  return ({ name, migration }) => name === nameOrId || migration === id;
}

function isOpen({ role, state }: Migration): boolean {
  return state === 'in-doubt' && role === 'source';
}

function sayMeaning(migration: Named): string {
  const said = meaning(migration, migration.name ?? migration.id, migration.isOver);
  const { reason, message } = migration;
  return reason ? `${said} (${because({ reason, message: message ?? '' })})` : said;
}
