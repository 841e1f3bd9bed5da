import { bootId } from 'vtpm-common';
import { passVisit } from '../door-events.js';
import type { VmRun } from '../vm-run.js';
import type { VtpmContext } from '../vtpm-state.js';
import type { VtpmStatus } from '../vtpm-status.js';
import type { WorkerProcess } from '../worker-process.js';
import type { WorkerSupply } from '../worker-supply.js';
import type { Coming } from './live-arrival.js';
import { StandIn } from './stand-in.js';
import { VmmArrival } from './vmm-arrival.js';

export interface VmmTravelParts {
  readonly context: Pick<VtpmContext, 'admin' | 'office'>;
  readonly status: VtpmStatus;
  readonly supply: WorkerSupply;
  /** The worker serves: its end is looked after. */
  watch(worker: WorkerProcess): void;
}

/** What is particular where a vTPM moves with its VM: its VMM is served at both ends, all the time. */
export class VmmTravel {
  readonly #parts: VmmTravelParts;
  #leaving: StandIn | undefined;
  #arrival: VmmArrival | undefined;

  constructor(parts: VmmTravelParts) {
    this.#parts = parts;
  }

  /** The VMM will take the TPM out soon, and then there must be somebody at once. @param called as StandInParts.called */
  prepareToLeave(run: VmRun, called: () => Promise<void>): void {
    const { status, supply } = this.#parts;
    const { state, log, vmm } = status;
    if (!('doors' in state)) return;
    const bufferSize = vmm?.bufferSize ?? 0;
    const claim = (broken: AbortSignal) => supply.claim(broken);
    this.#leaving = new StandIn({ kind: 'away', run, doors: state.doors, bufferSize, log, claim, called });
    this.#leaving.prepare();
  }

  /** The worker has ended. */
  standAway(): void {
    this.#parts.status.standIn = this.#leaving;
    this.#leaving?.start();
  }

  /** It does not leave, or it has left. Resolves when nobody stands in any more. */
  async endStandIn(): Promise<void> {
    const standIn = this.#leaving;
    this.#leaving = undefined;
    await standIn?.end();
    if (this.#parts.status.standIn === standIn) this.#parts.status.standIn = undefined;
  }

  /** It is on its way here, or just coming up. */
  get isArriving(): boolean {
    return this.#arrival !== undefined;
  }

  /** Resolves when its VMM can connect. @throws ToolstackError; nothing is left then */
  async arrive({ from, epoch, vmRunId }: Coming): Promise<void> {
    const { status, context, supply, watch } = this.#parts;
    const run = supply.nextRun();
    const doors = await supply.openDoors(run);
    const entry = { ...status.entry, vmRunId };
    status.state = { kind: 'arriving', reason: `it comes from ${from}, with its VM`, doors };
    status.vmm = undefined;
    const arrival = new VmmArrival({
      ...{ run, doors, log: status.log },
      claim: (broken) => supply.claim(broken),
      start: { ...supply.startParts(run), entry },
      issue: (key, digest) => context.office.expect(entry, key, digest, epoch),
      hasArrived: async () => (await context.admin.vtpm(entry.id))?.kind === 'live',
      serves: (worker, serving, visits) => {
        this.#arrival = status.standIn = undefined;
        status.state = { kind: 'running', worker, doors };
        const known = new Set(visits.map(({ id }) => id));
        for (const visit of doors.visits()) if (!known.has(visit.id)) passVisit(status, run, visit);
        watch(worker);
        // It is here, whether that can be written now or not.
        status.tryUpdate({
          ...{ vmRunId, epoch: serving.epoch, runningInBoot: bootId().toString('hex') },
          ...{ manufactured: true, crashed: null, moved: null, migration: null },
        });
        status.log.info({ ...serving, pid: worker.pid, from }, 'arrived with its VM, and running');
      },
    });
    this.#arrival = arrival;
    status.standIn = arrival.standIn;
    try {
      await arrival.standIn.begin();
      doors.show();
    } catch (error) {
      await this.comesNot();
      throw error;
    }
  }

  /** Resolves when nothing of it is left here. */
  async comesNot(): Promise<void> {
    const { status } = this.#parts;
    const { state } = status;
    const arrival = this.#arrival;
    if (!arrival) return;
    this.#arrival = status.standIn = undefined;
    if ('doors' in state) state.doors.closeEntrances();
    await arrival.end();
    if ('doors' in state) state.doors.close();
    status.state = { kind: 'arriving', reason: 'it does not come', worker: undefined };
  }
}
