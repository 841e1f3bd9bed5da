import { join } from 'node:path';
import { ToolstackError } from '../error.js';
import type { DoorName } from './control-protocol.js';

/**
 * The doors that a vTPM can have. `tpm`: raw TPM stream. `tcti`: what tpm2-tss's swtpm TCTI expects. `control`: swtpm's
 * control protocol, for a VMM. `mssim`: the TCG simulator's two ports on the loopback interface. `ring`: pages shared with a
 * frontend on this host.
 */
export const DOOR_KINDS = ['tpm', 'tcti', 'control', 'mssim', 'ring'] as const;
export type DoorKind = (typeof DOOR_KINDS)[number];

export const DEFAULT_DOORS: readonly DoorKind[] = ['tpm', 'tcti'];

/** Nothing but connections can be passed into a worker's own VM. */
const SERVED_IN_VM: readonly DoorKind[] = ['tpm', 'tcti'];

/** Where clients of each kind come in. */
const ENTRANCES: Readonly<Record<DoorKind, readonly DoorName[]>> = {
  tpm: ['tpm'],
  tcti: ['tcti', 'tcti-ctrl'],
  control: ['control'],
  mssim: ['mssim', 'mssim-platform'],
  ring: ['ring'],
};

/** Of those that are unix sockets. `vmm-data` is no entrance: a VMM gives it. */
const FILES: Readonly<Partial<Record<DoorName, string>>> = {
  tpm: 'tpm.sock',
  tcti: 'tcti.sock',
  'tcti-ctrl': 'tcti.sock.ctrl',
  control: 'control.sock',
  ring: 'ring.sock',
};

export function entrancesOf(kinds: readonly DoorKind[]): DoorName[] {
  return kinds.flatMap((kind) => ENTRANCES[kind]);
}

/** @returns undefined where it has none */
export function doorFile(directory: string, door: DoorName): string | undefined {
  const file = FILES[door];
  return file === undefined ? undefined : join(directory, file);
}

/** The paths of all that are sockets, whether a vTPM has them or not. */
export function doorFiles(directory: string): string[] {
  return Object.values(FILES).map((file) => join(directory, file));
}

/** Whether the VMM powers the TPM on and off, or the worker does it with its start and stop. */
export function powerOf(kinds: readonly DoorKind[]): 'on' | 'vmm' {
  return kinds.includes('control') || kinds.includes('mssim') ? 'vmm' : 'on';
}

/** @returns undefined for anything but a list of kinds, at least one, none twice */
export function parseDoors(value: unknown): readonly DoorKind[] | undefined {
  if (!Array.isArray(value) || value.length === 0 || new Set(value).size !== value.length) return undefined;
  return value.every((kind) => DOOR_KINDS.includes(kind)) ? value : undefined;
}

/** @throws ToolstackError `bad-request` where a vTPM cannot have them */
export function checkDoors(kinds: readonly DoorKind[], isolation: 'sandbox' | 'vm' | 'none'): void {
  if (kinds.includes('mssim') && kinds.includes('control')) {
    throw new ToolstackError(
      'bad-request',
      'a vTPM of a VM (door "control") cannot have the door "mssim": whoever may connect to it could power the TPM of the VM off',
    );
  }
  const other = isolation === 'vm' && kinds.find((kind) => !SERVED_IN_VM.includes(kind));
  if (!other) return;
  throw new ToolstackError(
    'bad-request',
    `a worker in a VM of its own does not serve the door "${other}"; choose among: ${SERVED_IN_VM.join(', ')}`,
  );
}
