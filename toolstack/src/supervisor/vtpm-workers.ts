import type { WorkerMessage } from './control-protocol.js';
import { takeDataChannel } from './door-events.js';
import type { InheritedDescriptors } from './handover/descriptors.js';
import type { VtpmHandOver } from './handover/state.js';
import { TravellingWorkers } from './migration/travelling-workers.js';
import { powerOn } from './power-on.js';
import { killAndWait } from './processes.js';
import { isFinal } from './restart-policy.js';
import { crash, type Gate, Restarts } from './restarts.js';
import type { VmRun } from './vm-run.js';
import type { VtpmContext, VtpmState } from './vtpm-state.js';
import type { VtpmStatus } from './vtpm-status.js';
import type { WorkerEnd } from './worker-end.js';
import type { WorkerProcess } from './worker-process.js';
import { WorkerSupply } from './worker-supply.js';

const UNKEPT = 'and nothing is check-pointed';

/** The workers that serve one vTPM, one after another, and the connections that outlive them. */
export class VtpmWorkers {
  /** To another host, and from one. */
  readonly travel: TravellingWorkers;
  readonly #context: VtpmContext;
  readonly #status: VtpmStatus;
  readonly #supply: WorkerSupply;
  readonly #restarts: Restarts;

  /** @param gate no restart begins while it is held */
  constructor(context: VtpmContext, status: VtpmStatus, gate: Gate) {
    this.#context = context;
    this.#status = status;
    this.#supply = new WorkerSupply(context, status, (message) => this.#take(message));
    const parts = {
      context,
      status,
      supply: this.#supply,
      watch: (worker: WorkerProcess) => this.#watch(worker),
    };
    this.#restarts = new Restarts({ ...parts, gate });
    this.travel = new TravellingWorkers({ ...parts, restarts: this.#restarts });
  }

  /**
   * Those that the program before this one looked after. A worker that cannot be taken over is killed, and another one goes on
   * when nothing of it is left (I-3). All at once: neither the worker nor a guest can say anything before both are in place.
   */
  async adopt(
    { state, reason, lingering }: VtpmHandOver,
    before: NonNullable<VtpmHandOver['served']>,
    inherited: InheritedDescriptors,
  ): Promise<void> {
    const { launcher, settings } = this.#context;
    const processes = before.worker?.processes ?? [];
    try {
      const run = this.#supply.adoptRun(before.run, inherited);
      const doors = this.#supply.adoptDoors(run, before.doors, inherited);
      const goOn = (why: string): void => {
        void this.#restarts.begin(this.#restarts.goOn(run, doors, why));
      };
      if (!before.worker) return goOn(reason ?? 'the worker ended');
      try {
        const { isolation } = this.#status.entry;
        const worker = launcher.adopt(isolation, before.worker, inherited, this.#supply.owner);
        if (state === 'lost') this.#status.state = { kind: 'lost', reason: reason ?? '', worker, doors };
        else this.#status.state = { kind: 'running', worker, doors };
        this.#watch(worker);
      } catch (error) {
        this.#status.lingering = [...lingering, ...processes];
        this.#status.log.error({ reason: (error as Error).message }, 'the worker cannot be taken over');
        if (settings.checkpoint === 'off') run.lost ??= `its worker could not be taken over, ${UNKEPT}`;
        goOn(`its worker could not be taken over (${(error as Error).message})`);
      }
    } catch (error) {
      this.#status.lingering = [...lingering, ...processes];
      await killAndWait(processes).catch(() => undefined);
      this.run?.end();
      const why = `it could not be taken over (${(error as Error).message})`;
      this.#status.log.error({ reason: why }, 'the vTPM crashed; start it again with a new run of its VM');
      this.#status.crashed(why);
    }
  }

  get run(): VmRun | undefined {
    return this.#supply.run;
  }

  /** When no restart is under way. */
  get settled(): Promise<void> {
    return this.#restarts.settled;
  }

  /** A new VM run, and its first worker. Resolves when the doors are open. @throws ToolstackError */
  async powerOn(): Promise<void> {
    await killAndWait(this.#status.lingering);
    this.#status.lingering = [];
    await powerOn({
      ...{ status: this.#status, supply: this.#supply },
      isClosed: () => this.#restarts.isClosed,
      watch: (worker) => this.#watch(worker),
    });
  }

  /** For the end of the supervisor: a start under way fails, no fresh worker takes the place of its lost one, and none goes on. */
  async breakOffStart(): Promise<void> {
    this.#restarts.close();
    const { state } = this.#status;
    const { kind } = state;
    if ((kind === 'starting' || kind === 'arriving' || kind === 'restarting') && 'worker' in state)
      await state.worker?.kill();
  }

  /** A run without a TPM that works: there is nothing to save. */
  async breakOff(state: VtpmState & { kind: 'lost' | 'restarting' }): Promise<void> {
    this.run?.end();
    const before = state.worker;
    this.#status.state = { kind: 'stopped', reason: null };
    await before?.kill();
    await this.#restarts.settled;
    state.doors.close();
  }

  /** The gate is open again. */
  released(): void {
    this.#restarts.released();
  }

  #watch(worker: WorkerProcess): void {
    void worker.ended.then((end) => this.#ended(worker, end));
  }

  #take(message: WorkerMessage): void {
    const { state } = this.#status;
    switch (message.type) {
      case 'connection-closed':
        if ('doors' in state) state.doors.forget(message.id);
        return;
      case 'data-channel':
        if (this.run) takeDataChannel(this.#status, this.run);
        return;
      case 'vmm': {
        const { connected, power, bufferSize, locality } = message;
        this.#status.vmm = { connected, power, bufferSize, locality };
        return;
      }
      case 'vmm-shut-down':
        this.#status.attendant?.shutDown();
        return;
      case 'vmm-calls':
        this.#status.standIn?.heard(message);
        return;
      case 'vm-reset':
        if (state.kind === 'lost') this.#restarts.reset(state, message);
        return;
    }
  }

  /** The worker ended. Where a stop is waiting for that, it deals with it. */
  #ended(worker: WorkerProcess, end: WorkerEnd): void {
    const status = this.#status;
    const { state } = status;
    const { run } = this;
    if ((state.kind !== 'running' && state.kind !== 'lost') || state.worker !== worker || !run) return;
    const { doors } = state;
    status.lingering = end.lingering;
    if (this.travel.isLeaving) {
      status.state = { kind: 'migrating', reason: end.reason, doors };
      return;
    }
    if (end.clean) {
      doors.close();
      run.end();
      status.state = { kind: 'stopped', reason: null };
      status.tryUpdate({ runningInBoot: null });
      return;
    }
    if (isFinal(status.entry.isolation, end) || !run.mayRestart()) {
      crash(status, run, doors, end.reason);
      return;
    }
    status.log.warn({ reason: end.reason }, 'the worker ended; another one goes on');
    if (this.#context.settings.checkpoint === 'off') run.lost ??= `${end.reason}, ${UNKEPT}`;
    void this.#restarts.begin(this.#restarts.goOn(run, doors, end.reason));
  }
}
