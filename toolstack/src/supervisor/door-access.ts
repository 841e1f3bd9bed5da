import { chmodSync, chownSync, statSync } from 'node:fs';
import { dirname } from 'node:path';
import type { Paths, Settings } from 'vtpm-common';
import { ToolstackError } from '../error.js';
import type { Entry } from './entry.js';

/** Whom doors belong to, and what their owner and group may. */
export interface DoorAccess {
  /** undefined: the supervisor's own user and group. */
  readonly owner: { readonly uid: number; readonly gid: number } | undefined;
  readonly mode: number;
}

export function accessOf({ socketOwner, socketMode }: Pick<Entry, 'socketOwner' | 'socketMode'>): DoorAccess {
  const [uid, gid] = socketOwner?.split(':').map(Number) ?? [];
  return {
    owner: uid === undefined || gid === undefined ? undefined : { uid, gid },
    mode: Number.parseInt(socketMode, 8),
  };
}

/** The directory of doors: whoever they belong to may pass through it, nobody but the supervisor may change it. */
export function directoryMode({ owner }: DoorAccess): number {
  return owner ? 0o711 : 0o700;
}

/** Hands a socket over. Its directory is the supervisor's alone, so nobody can put another file in its place. */
export function applyAccess(path: string, { owner, mode }: DoorAccess): void {
  // Connecting needs the right to write: until the mode is set only the supervisor's user or the new owner has it.
  if (owner) chownSync(path, owner.uid, owner.gid);
  chmodSync(path, mode);
}

/**
 * Opens the way to the doors and the drop-in's socket, for passing only, while others use some, and closes it again.
 * Directories that are another user's are left as they are.
 */
export function setPassage(
  paths: Paths,
  entries: readonly Entry[],
  settings: Pick<Settings, 'dropin-users'>,
): void {
  const isShared =
    entries.some(({ socketOwner }) => socketOwner !== null) || settings['dropin-users'].trim() !== '';
  for (const directory of [paths.run, paths.supervisor.doors]) {
    const { uid, mode } = statSync(directory);
    if (uid !== process.getuid?.()) continue;
    if (isShared && (mode & 0o011) !== 0o011) chmodSync(directory, (mode & 0o7777) | 0o011);
    // What was opened here is closed here; another mode is the operator's own.
    if (!isShared && (mode & 0o7777) === 0o711) chmodSync(directory, 0o700);
  }
}

/**
 * Found out when the vTPM is registered and not when a guest cannot start.
 * @throws ToolstackError `bad-request` where this supervisor may not give sockets away like that, or the owner could
 * not get to them
 */
export function checkAccess(entry: Pick<Entry, 'socketOwner' | 'socketMode'>, paths: Paths): void {
  const { owner } = accessOf(entry);
  if (!owner) return;
  const self = process.getuid?.();
  if (self !== 0) {
    const groups = [process.getgid?.(), ...(process.getgroups?.() ?? [])];
    if (owner.uid !== self || !groups.includes(owner.gid)) {
      throw new ToolstackError(
        'bad-request',
        `only a supervisor of root gives sockets to user ${owner.uid}, group ${owner.gid}; this one (user ${self}) may choose its own user and its own groups`,
      );
    }
  }
  // The run directory and what is below it the supervisor opens itself.
  for (let at = dirname(paths.run); ; at = dirname(at)) {
    if (!mayPass(at, owner)) {
      throw new ToolstackError(
        'bad-request',
        `user ${owner.uid} cannot get to sockets below ${paths.run}: ${at} lets others not through; give the installation another --run-dir, for example /run/vtpm-manager`,
      );
    }
    if (at === dirname(at)) return;
  }
}

function mayPass(directory: string, owner: { readonly uid: number; readonly gid: number }): boolean {
  const { uid, gid, mode } = statSync(directory);
  if (owner.uid === 0) return true;
  const bit = uid === owner.uid ? 0o100 : gid === owner.gid ? 0o010 : 0o001;
  return (mode & bit) !== 0;
}
