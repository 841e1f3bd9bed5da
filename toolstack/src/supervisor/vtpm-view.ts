import { type VmLayer, vmLayers } from '../vm/layers.js';
import type { Confinements } from './confinement.js';
import { type DoorKind, doorFile } from './door-kinds.js';
import type { Entry } from './entry.js';
import { confinementOf, type Layer, type Profile } from './layers.js';
import type { VtpmState } from './vtpm-state.js';
import type { VtpmStatus } from './vtpm-status.js';

/** S of the supervisor's API. */
export interface VtpmView {
  readonly id: string;
  readonly name: string;
  readonly vmUuid: string;
  readonly isolation: string;
  readonly autostart: boolean;
  readonly startup: string;
  readonly doors: readonly DoorKind[];
  readonly socketOwner: string | null;
  readonly socketMode: string;
  readonly state: VtpmState['kind'];
  /** Why it crashed, or why the last start or stop did not go as asked. */
  readonly reason: string | null;
  readonly vmRunId: string | null;
  /** The newest epoch that a worker serves, served or is about to. */
  readonly epoch: number | null;
  readonly worker: {
    readonly pid: number;
    readonly isolation: string;
    readonly profile: Profile;
    /** In force, by /proc. */
    readonly layers: readonly (Layer | VmLayer)[];
    /** What the sandbox should have and was told not to insist on. */
    readonly waived: readonly Layer[];
    readonly startedAt: string;
  } | null;
  /** Null for doors that it does not have. */
  readonly sockets: Readonly<Record<'tpm' | 'tcti' | 'control' | 'ring', string | null>>;
}

export function viewOf({ entry, state, doorsDirectory }: VtpmStatus, confinements: Confinements): VtpmView {
  const { id, name, vmUuid, isolation, autostart, startup, doors, socketOwner, socketMode } = entry;
  const worker = 'worker' in state ? state.worker : undefined;
  return {
    ...{ id, name, vmUuid, isolation, autostart, startup, doors, socketOwner, socketMode },
    state: state.kind,
    reason: 'reason' in state ? state.reason : null,
    vmRunId: entry.vmRunId,
    epoch: entry.epoch,
    worker:
      worker?.pid === undefined
        ? null
        : {
            pid: worker.pid,
            isolation,
            ...layersOf(worker.pid, isolation, confinements),
            startedAt: worker.startedAt.toISOString(),
          },
    sockets: socketsOf(doors, doorsDirectory),
  };
}

function socketsOf(doors: readonly DoorKind[], directory: string): VtpmView['sockets'] {
  const path = (kind: 'tpm' | 'tcti' | 'control' | 'ring'): string | null =>
    (doors.includes(kind) ? doorFile(directory, kind) : undefined) ?? null;
  return { tpm: path('tpm'), tcti: path('tcti'), control: path('control'), ring: path('ring') };
}

function layersOf(
  pid: number,
  isolation: Entry['isolation'],
  { profile, waived }: Confinements,
): Pick<NonNullable<VtpmView['worker']>, 'profile' | 'layers' | 'waived'> {
  const layers = vmLayers(pid, confinementOf(pid, waived));
  return { profile, layers, waived: isolation === 'none' ? [] : [...waived] };
}
