import { join } from 'node:path';
import { CheckpointStore } from './checkpoint-store.js';
import type { WorkerMessage } from './control-protocol.js';
import { accessOf } from './door-access.js';
import { doorEvents } from './door-events.js';
import { Doors } from './doors.js';
import type { DoorPlan } from './entrances.js';
import type { InheritedDescriptors } from './handover/descriptors.js';
import type { DoorsHandOver, RunHandOver } from './handover/state.js';
import { VmRun } from './vm-run.js';
import type { VtpmContext } from './vtpm-state.js';
import type { VtpmStatus } from './vtpm-status.js';
import type { ClaimedWorker } from './worker-pool.js';
import type { WorkerOwner } from './worker-process.js';
import type { StartParts } from './worker-start.js';

/** What each worker of a vTPM needs: a process, the memory of the VM run that it serves, and doors. */
export class WorkerSupply {
  /** While there is a worker, or there is to be one. */
  run: VmRun | undefined;
  readonly #context: VtpmContext;
  readonly #status: VtpmStatus;
  readonly #hear: (message: WorkerMessage) => void;

  /** @param hear what workers say */
  constructor(context: VtpmContext, status: VtpmStatus, hear: (message: WorkerMessage) => void) {
    this.#context = context;
    this.#status = status;
    this.#hear = hear;
  }

  get owner(): WorkerOwner {
    return {
      logPath: join(this.#context.paths.log, `vtpm-${this.#status.entry.name}.log`),
      log: this.#status.log,
      onMessage: this.#hear,
    };
  }

  /** A worker that waits for an identity. @throws ToolstackError */
  claim(broken?: AbortSignal): Promise<ClaimedWorker> {
    return this.#context.pool.take(this.#status.entry.isolation, this.owner, broken);
  }

  /** As `claim`, and none that waited in the pool. */
  claimFresh(): Promise<ClaimedWorker> {
    return this.#context.pool.fresh(this.#status.entry.isolation, this.owner);
  }

  /** A worker has left what the next one needs. */
  get hasRun(): boolean {
    return this.run !== undefined && !this.run.isOver;
  }

  /** Takes the place of the one before, which is not ended by that. */
  nextRun(): VmRun {
    const control = this.#status.entry.doors.includes('control');
    this.run = new VmRun(this.#context.settings['restart-burst'], CheckpointStore.create({ control }));
    return this.run;
  }

  /** @throws ToolstackError `corrupt` */
  adoptRun(before: RunHandOver, inherited: InheritedDescriptors): VmRun {
    this.run = VmRun.adopt(this.#context.settings['restart-burst'], before, inherited);
    return this.run;
  }

  /** Nobody finds them before they are shown. */
  openDoors(run: VmRun): Promise<Doors> {
    return Doors.open(this.#doorPlan, doorEvents(this.#status, run));
  }

  adoptDoors(run: VmRun, before: DoorsHandOver, inherited: InheritedDescriptors): Doors {
    return Doors.adopt(this.#doorPlan, doorEvents(this.#status, run), before, inherited);
  }

  get #doorPlan(): DoorPlan {
    const { entry, doorsDirectory: directory } = this.#status;
    return { directory, access: accessOf(entry), kinds: entry.doors };
  }

  startParts(run: VmRun): StartParts {
    const { office, settings } = this.#context;
    return { office, settings, run, entry: this.#status.entry };
  }
}
