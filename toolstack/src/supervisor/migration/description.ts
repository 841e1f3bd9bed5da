import { ToolstackError } from '../../error.js';
import { type Entry, type NewEntry, parseNewEntryFields } from '../entry.js';

/** Of what a destination is told of a vTPM; a newer one is refused by name. */
const FORMAT = 1;

/** What a vTPM takes along of its entry. Whom its doors belong to, and who starts it, is each host's own. */
export type Description = Pick<
  NewEntry,
  'name' | 'isolation' | 'autostart' | 'startup' | 'doors' | 'stateBlobs' | 'socketMode'
>;

const FIELDS = ['name', 'isolation', 'autostart', 'startup', 'doors', 'stateBlobs', 'socketMode'] as const;

/** How one that was here before is run when it comes back: what can be changed may have been, the rest is this host's own. */
export function asKnown(description: Description, { name, isolation, stateBlobs }: Entry): Description {
  return { ...description, name, isolation, stateBlobs };
}

/** JSON, for a migrate order. */
export function describe(entry: Entry): string {
  const fields = FIELDS.map((field) => [field, entry[field]]);
  return JSON.stringify({ format: FORMAT, ...Object.fromEntries(fields) });
}

/** @throws ToolstackError `bad-request` | `newer-format` */
export function readDescription(text: string): Description {
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch {
    // Reported as any other that is none.
  }
  const { format, ...fields } = (typeof value === 'object' && value !== null ? value : {}) as Record<
    string,
    unknown
  >;
  if (typeof format === 'number' && format > FORMAT) {
    throw new ToolstackError(
      'newer-format',
      `the vTPM is described in format ${format}, this host knows ${FORMAT}; upgrade it first`,
    );
  }
  if (format !== FORMAT) {
    throw new ToolstackError('bad-request', 'the vTPM is described in a way that this host does not know');
  }
  return parseNewEntryFields(fields, FIELDS);
}
