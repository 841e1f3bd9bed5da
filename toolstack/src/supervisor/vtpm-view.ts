import type { VmLayer } from '../vm/layers.js';
import type { Confinements } from './confinement.js';
import type { VmmStatus } from './control-protocol.js';
import { type DoorKind, doorFile } from './door-kinds.js';
import type { EntryMigration } from './entry.js';
import type { Layer, Profile } from './layers.js';
import { describe } from './migration/description.js';
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
  readonly stateBlobs: string;
  readonly socketOwner: string | null;
  readonly socketMode: string;
  /** Where its token is and whose, where swtpm starts it. */
  readonly dropin: { readonly place: string; readonly uid: number } | null;
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
    /** In force, by /proc: at the latest when it became ready. */
    readonly layers: readonly (Layer | VmLayer)[];
    /** What the sandbox should have and was told not to insist on. */
    readonly waived: readonly Layer[];
    readonly startedAt: string;
  } | null;
  /** Where it lives; null: here, as far as is known. */
  readonly movedTo: string | null;
  /** Since when, ISO 8601. */
  readonly movedAt: string | null;
  /** One that is not settled. */
  readonly migration: Pick<EntryMigration, 'id' | 'role' | 'peer'> | null;
  /** What another supervisor makes its entry from, JSON. Only where one vTPM is asked for. */
  readonly description?: string;
  /** Of a vTPM that its VMM powers and that runs. */
  readonly vmm: VmmStatus | null;
  /** Null for doors that it does not have, and where it has moved. `mssim`: its command port while it is open, the platform port is the next one. */
  readonly sockets: Readonly<Record<'tpm' | 'tcti' | 'control' | 'ring', string | null>> & {
    readonly mssim: number | null;
  };
}

/** @param looksAgain at the layers of the worker: some twenty files of /proc, too many for each one of a long list */
export function viewOf(
  { entry, state, standIn, vmm, doorsDirectory }: VtpmStatus,
  { profile, waived }: Pick<Confinements, 'profile' | 'waived'>,
  looksAgain: boolean,
): VtpmView {
  const { id, name, vmUuid, isolation, autostart, startup, doors, stateBlobs, socketOwner, socketMode } =
    entry;
  const worker = standIn ? standIn.process : 'worker' in state ? state.worker : undefined;
  return {
    ...{ id, name, vmUuid, isolation, autostart, startup, doors, stateBlobs, socketOwner, socketMode },
    dropin: entry.dropin && { place: entry.dropin.place, uid: entry.dropin.uid },
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
            profile,
            layers: worker.layers(looksAgain),
            waived: isolation === 'none' ? [] : [...waived],
            startedAt: worker.startedAt.toISOString(),
          },
    movedTo: entry.moved?.to ?? null,
    movedAt: entry.moved?.at ?? null,
    migration: entry.migration && {
      id: entry.migration.id,
      role: entry.migration.role,
      peer: entry.migration.peer,
    },
    ...(looksAgain && { description: describe(entry) }),
    vmm: worker && vmm ? vmm : null,
    sockets: {
      ...socketsOf(state.kind === 'moved' ? [] : doors, doorsDirectory),
      mssim: ('doors' in state ? state.doors.mssimPort : undefined) ?? null,
    },
  };
}

function socketsOf(doors: readonly DoorKind[], directory: string): Omit<VtpmView['sockets'], 'mssim'> {
  const path = (kind: 'tpm' | 'tcti' | 'control' | 'ring'): string | null =>
    (doors.includes(kind) ? doorFile(directory, kind) : undefined) ?? null;
  return { tpm: path('tpm'), tcti: path('tcti'), control: path('control'), ring: path('ring') };
}
