import { ToolstackError } from '../error.js';
import type { SupervisorVtpm } from './supervisor-api.js';

/** @returns where a vTPM is that cannot be used here, and what helps; undefined of one that is here */
export function sayElsewhere(vtpm: SupervisorVtpm): string | undefined {
  const { name, state, reason, movedTo, movedAt } = vtpm;
  const why = reason ? ` (${reason})` : '';
  switch (state) {
    case 'moved':
      return `it lives on ${movedTo ?? 'another host'}${movedAt ? ` since ${movedAt}` : ''}: use it there, or migrate it back from there`;
    case 'migrating':
      return `it is on its way to another host${why}; where it stands: vtpmctl migrate status ${name}`;
    case 'arriving':
      return `it comes from another host and is not here yet${why}; where it stands: vtpmctl migrate status ${name}`;
    default:
      return undefined;
  }
}

/** @throws ToolstackError `moved` | `migrating` */
export function checkHere(vtpm: SupervisorVtpm): void {
  const said = sayElsewhere(vtpm);
  if (said === undefined) return;
  throw new ToolstackError(
    vtpm.state === 'moved' ? 'moved' : 'migrating',
    `${vtpm.name} is not here: ${said}`,
  );
}
