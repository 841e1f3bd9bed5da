import type { Logger, Paths, Settings } from 'vtpm-common';
import type { AdminClient } from './admin-client.js';
import type { Confinements } from './confinement.js';
import type { Doors } from './doors.js';
import type { TicketOffice } from './ticket-office.js';
import type { VtpmList } from './vtpm-list.js';
import type { WorkerLauncher } from './worker-launcher.js';
import type { WorkerPool } from './worker-pool.js';
import type { WorkerProcess } from './worker-process.js';

/** What every vTPM of a supervisor shares. */
export interface VtpmContext {
  readonly list: VtpmList;
  readonly launcher: WorkerLauncher;
  readonly pool: WorkerPool;
  readonly confinements: Confinements;
  readonly office: TicketOffice;
  readonly admin: AdminClient;
  readonly paths: Paths;
  readonly settings: Settings;
  readonly log: Logger;
}

/**
 * `stopped`: no process. `starting`: a worker is there, the doors are not. `running`: a guest is served.
 * `restarting`: the worker ended unasked, and another one is to go on where it was; connections stay. `lost`: that is not
 * possible, and a worker answers TPM_RC_FAILURE to everything until the VM is reset (an explicit start). `stopping`: asked
 * to save and end. `crashed`: no worker can be kept alive; the doors are closed until an explicit start. `migrating`: it is
 * frozen, and runs nowhere until it is known what came of its migration; while it has doors, connections stay. `arriving`: it
 * comes from another host, and its worker, where there is one, waits for the manager's word; where it has doors it comes with its
 * VMM, which waits there. `moved`: it lives on another host.
 */
export type VtpmState =
  | { readonly kind: 'stopped'; readonly reason: string | null }
  | { readonly kind: 'starting'; readonly worker: WorkerProcess | undefined }
  | { readonly kind: 'running'; readonly worker: WorkerProcess; readonly doors: Doors }
  | {
      readonly kind: 'restarting';
      readonly reason: string;
      readonly doors: Doors;
      worker: WorkerProcess | undefined;
    }
  | { readonly kind: 'lost'; readonly reason: string; readonly worker: WorkerProcess; readonly doors: Doors }
  | { readonly kind: 'stopping'; readonly worker: WorkerProcess; readonly doors: Doors }
  | { readonly kind: 'crashed'; readonly reason: string }
  | { readonly kind: 'migrating'; readonly reason: string; readonly doors: Doors }
  | { readonly kind: 'migrating'; readonly reason: string }
  | { readonly kind: 'arriving'; readonly reason: string; readonly worker: WorkerProcess | undefined }
  | { readonly kind: 'arriving'; readonly reason: string; readonly doors: Doors }
  | { readonly kind: 'moved'; readonly reason: string };
