import { ToolstackError } from '../../error.js';
import type { AdminClient, ManagerRecord } from '../admin-client.js';
import type { Entry, EntryMigration } from '../entry.js';

/** What became of a migration. `pending`: the manager does not know yet. */
export type Outcome =
  | { readonly verdict: 'COMMIT' | 'ABORT'; readonly record: ManagerRecord | undefined }
  | {
      readonly verdict: 'pending';
      /** It waits here for its VMM. */
      readonly awaitsVmm: boolean;
    };

/** Why a vTPM is crashed whose VM may still run: no TPM with fresh PCRs may come back under it. */
export const SUPERVISOR_ENDED = 'the supervisor ended and its workers with it';

const PENDING: readonly string[] = ['preparing', 'departing', 'in-doubt'];

/**
 * The manager's record decides: it forgets a migration that is settled on both ends, and never where the vTPM lives.
 * @throws ToolstackError `manager-unreachable` | `manager-refused` | …
 */
export async function outcomeOf(
  admin: Pick<AdminClient, 'migration' | 'vtpm'>,
  { id }: Pick<Entry, 'id'>,
  migration: EntryMigration,
): Promise<Outcome> {
  const known = await admin.migration(migration.id);
  if (known && PENDING.includes(known.state)) {
    const awaitsVmm = migration.role === 'arriving' && known.mode === 'VMM';
    return { verdict: 'pending', awaitsVmm };
  }
  const record = await admin.vtpm(id);
  if (record?.migrating) return { verdict: 'pending', awaitsVmm: false };
  if (record?.kind === 'retired') {
    throw new ToolstackError('manager-refused', `vTPM ${id} was retired while it was on its way`);
  }
  const isHere = record?.kind === 'live';
  // What never left has a record; of what never came there is none, or that of an earlier leaving.
  const hasMoved = migration.role === 'departing' ? record?.kind === 'moved' : isHere;
  return { verdict: hasMoved ? 'COMMIT' : 'ABORT', record };
}
