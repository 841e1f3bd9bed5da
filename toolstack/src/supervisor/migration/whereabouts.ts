import { ToolstackError } from '../../error.js';
import type { Entry } from '../entry.js';
import type { VtpmState } from '../vtpm-state.js';

/** It may not be run here, or only the manager knows whether it may. */
type Elsewhere = VtpmState & { readonly kind: 'migrating' | 'arriving' | 'moved' };

export function isElsewhere(state: VtpmState): state is Elsewhere {
  return state.kind === 'migrating' || state.kind === 'arriving' || state.kind === 'moved';
}

/** Why nothing can be done with it here, where it is, and what can be done. */
export function elsewhere({ name, moved, migration }: Entry, { kind, reason }: Elsewhere): ToolstackError {
  switch (kind) {
    case 'moved':
      return new ToolstackError(
        'moved',
        `vTPM ${name} lives on ${moved?.to ?? 'another host'} since ${moved?.at ?? 'it was migrated'}: use it there, or migrate ` +
          `it back from there; vtpmctl delete ${name} forgets it here`,
      );
    case 'migrating':
      return new ToolstackError(
        'migrating',
        `vTPM ${name} is on its way to ${migration?.peer ?? 'another host'} (${reason}); where it stands: vtpmctl migrate status ` +
          `${name}, to ask the other host: vtpmctl migrate resolve ${name}`,
      );
    case 'arriving':
      return new ToolstackError(
        'migrating',
        `vTPM ${name} comes from ${migration?.peer ?? 'another host'} and is not here yet (${reason}); where it stands: vtpmctl ` +
          `migrate status ${name}, to end it: vtpmctl migrate cancel ${name} on the host that it comes from`,
      );
  }
}

/** To whom something else is wanted meanwhile. @param operation a participle */
export function sayBusy({ name, migration }: Entry, operation: string): string {
  switch (operation) {
    case 'migrated':
      return `being migrated${migration ? ` to ${migration.peer}` : ''}; wait for that, or: vtpmctl migrate cancel ${name}`;
    case 'taken in':
      return `being taken in${migration ? ` from ${migration.peer}` : ''}; wait for that: vtpmctl migrate status ${name}`;
    default:
      return `being ${operation}; try again later`;
  }
}
