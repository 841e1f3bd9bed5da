import { ToolstackError } from '../../error.js';
import { killAndWait } from '../processes.js';
import type { Restarts } from '../restarts.js';
import type { VtpmContext } from '../vtpm-state.js';
import type { VtpmStatus } from '../vtpm-status.js';
import type { WorkerProcess } from '../worker-process.js';
import type { WorkerSupply } from '../worker-supply.js';
import { arriveLive, type Coming } from './live-arrival.js';
import { VmmTravel } from './vmm-travel.js';

/** Connections of a TPM that is frozen wait so long for the host that decides. */
const PATIENCE_MS = 300_000;

export interface TravellingParts {
  readonly context: Pick<VtpmContext, 'admin' | 'office'>;
  readonly status: VtpmStatus;
  readonly supply: WorkerSupply;
  readonly restarts: Restarts;
  /** The worker serves: its end is looked after. */
  watch(worker: WorkerProcess): void;
}

/** The workers of a vTPM while it goes to another host, or comes from one. */
export class TravellingWorkers {
  readonly #parts: TravellingParts;
  readonly #vmm: VmmTravel;
  #isLeaving = false;
  #patience: NodeJS.Timeout | undefined;

  constructor(parts: TravellingParts) {
    this.#parts = parts;
    this.#vmm = new VmmTravel(parts);
  }

  /** The TPM is being frozen: when its worker ends, nothing follows until it is known where it goes on. */
  get isLeaving(): boolean {
    return this.#isLeaving;
  }

  /** The manager freezes the TPM now. */
  expectLeaving(): void {
    this.#isLeaving = true;
  }

  /**
   * It is frozen: nothing of its worker can run any more when this resolves. Doors and connections stay, and the memory of the
   * VM run, so that another worker can go on. @throws Error where a process of it cannot be ended
   */
  async leave(reason: string): Promise<void> {
    const { status, restarts } = this.#parts;
    this.#isLeaving = true;
    await restarts.breakOff();
    const { state } = status;
    if (!('doors' in state)) {
      status.state = { kind: 'migrating', reason };
    } else {
      status.state = { kind: 'migrating', reason, doors: state.doors };
      if ('worker' in state && state.worker) await this.#endForGood(state.worker);
      // What a worker in a VM of its own had cannot be passed on.
      if (status.entry.isolation === 'vm') this.#dropConnections(reason);
    }
    await killAndWait(status.lingering);
    status.lingering = [];
  }

  /** What is around it may take longer: nobody waits for that. @throws Error where a process of it cannot be ended */
  async #endForGood(worker: WorkerProcess): Promise<void> {
    try {
      await worker.endProcesses();
    } catch (error) {
      this.#parts.status.lingering = (await worker.ended).lingering;
      throw error;
    }
  }

  /** Before `leave`, where the VM moves too. @param called its VMM needs the TPM here */
  prepareToLeave(called: () => Promise<void>): void {
    const { run } = this.#parts.supply;
    if (run) this.#vmm.prepareToLeave(run, called);
  }

  /** After `leave`: its VMM is served on. */
  standAway(): void {
    this.#vmm.standAway();
  }

  /** Nobody knows yet where it goes on. Connections do not wait for ever. */
  beInDoubt(reason: string): void {
    const { status } = this.#parts;
    const { state } = status;
    if (state.kind !== 'migrating' || !('doors' in state)) return;
    status.state = { ...state, reason };
    clearTimeout(this.#patience);
    this.#patience = setTimeout(() => this.#dropConnections(reason), PATIENCE_MS);
  }

  /** It goes on here, where it was frozen. Resolves when a worker serves, or none is to come. */
  async stay(reason: string): Promise<void> {
    const { status, supply, restarts } = this.#parts;
    this.#isLeaving = false;
    clearTimeout(this.#patience);
    await this.#vmm.endStandIn();
    const { state } = status;
    if (state.kind !== 'migrating') return;
    if ('doors' in state && supply.run) await restarts.begin(restarts.goOn(supply.run, state.doors, reason));
    else await this.resume(reason);
  }

  /** As `stay`, where no worker has served it here. */
  async resume(reason: string): Promise<void> {
    await this.#parts.restarts.begin(this.#resume(reason));
  }

  /** It lives elsewhere: nothing of it is left here. */
  gone(): void {
    this.#isLeaving = false;
    this.#dropConnections('');
  }

  #dropConnections(reason: string): void {
    const { status, supply } = this.#parts;
    clearTimeout(this.#patience);
    void this.#vmm.endStandIn();
    const { state } = status;
    if ('doors' in state) state.doors.close();
    supply.run?.end();
    if (state.kind === 'migrating') status.state = { kind: 'migrating', reason };
  }

  /** The VM run goes on, of which nothing is left here but what the manager has. */
  async #resume(reason: string): Promise<void> {
    const { status, supply, restarts } = this.#parts;
    try {
      const run = supply.hasRun && supply.run ? supply.run : supply.nextRun();
      const doors = await supply.openDoors(run);
      doors.show();
      await restarts.goOn(run, doors, reason);
    } catch (error) {
      status.crashed(ToolstackError.from(error, 'the vTPM cannot go on').message);
    }
  }

  /** A vTPM that comes from another host, frozen: see `arriveLive`. */
  async arrive(coming: Coming, onWaiting: () => Promise<void>): Promise<void> {
    const { supply } = this.#parts;
    const claimed = await supply.claim();
    await arriveLive({ ...this.#parts, claimed, run: supply.nextRun(), onWaiting }, coming);
  }

  /** As `arrive`, where its VMM brings it. Resolves when that can connect: when it comes, and whether, is not known then. */
  async arriveWithVmm(coming: Coming): Promise<void> {
    await this.#vmm.arrive(coming);
  }

  /** Its VMM has not brought it yet. */
  get isAwaited(): boolean {
    return this.#vmm.isArriving;
  }

  /** A worker of it has left what the next one needs. */
  get hasRun(): boolean {
    return this.#parts.supply.hasRun;
  }

  /** What `arrive` or `arriveWithVmm` began comes to nothing. */
  async comesNot(): Promise<void> {
    if (this.#vmm.isArriving) await this.#vmm.comesNot();
    this.#parts.supply.run?.end();
  }
}
