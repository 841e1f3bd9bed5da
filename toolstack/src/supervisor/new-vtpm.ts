import { join } from 'node:path';
import { checkSocketPath, type Paths, type SpaceShortage, shortageText, spaceShortage } from 'vtpm-common';
import { ToolstackError } from '../error.js';
import { collectVmSources } from '../vm/sources.js';
import { checkAccess } from './door-access.js';
import { checkDoors, doorFiles } from './door-kinds.js';
import { type Entry, isUuid, type NewEntry, newEntry, parseNewEntry } from './entry.js';
import type { VtpmContext } from './vtpm-state.js';

/**
 * The entry of a vTPM that is asked for, when nothing that is known already is in the way of its first start.
 * @param body as POST /vtpms has it
 * @throws ToolstackError `bad-request` | `store-full` | …
 */
export function checkedNewEntry(
  body: unknown,
  { office, paths, settings }: Pick<VtpmContext, 'office' | 'paths' | 'settings'>,
): Entry {
  const given = parseNewEntry(body);
  office.checkDelegation(given);
  checkAccess(given, paths);
  checkNewName(given.name);
  checkFirstStart(given, { paths, settings });
  return newEntry(given);
}

/** @throws ToolstackError `bad-request` */
export function checkNewName(name: string): void {
  if (isUuid(name))
    throw new ToolstackError('bad-request', `${name} is an id and no name; give the vTPM a name`);
}

/**
 * What does not hang on whom it belongs to.
 * @throws ToolstackError `bad-request` | `store-full` | …
 */
export function checkFirstStart(
  given: Pick<NewEntry, 'name' | 'doors' | 'isolation'>,
  { paths, settings }: Pick<VtpmContext, 'paths' | 'settings'>,
): void {
  try {
    for (const path of doorFiles(join(paths.supervisor.doors, given.name))) checkSocketPath(path);
  } catch (error) {
    throw new ToolstackError('bad-request', (error as Error).message);
  }
  checkDoors(given.doors, given.isolation);
  if (given.isolation === 'vm') collectVmSources(paths.supervisor.vm);
  checkRoom(paths, settings['store-reserve']);
}

/**
 * The manager would refuse the first start: then the name is refused already. Where the store is on another disk than the
 * list of vTPMs, both must have room.
 */
function checkRoom(paths: Paths, reserveMiB: number): void {
  for (const path of [paths.supervisor.directory, paths.manager.store]) {
    let shortage: SpaceShortage | undefined;
    try {
      shortage = spaceShortage(path, reserveMiB);
    } catch {
      // Another user's manager: it decides alone.
    }
    if (shortage) throw new ToolstackError('store-full', `no new vTPM is made: ${shortageText(shortage)}`);
  }
}
