import { closeSync } from 'node:fs';
import { ToolstackError } from '../error.js';
import type { DoorName } from './control-protocol.js';
import { checkDoors, type DoorKind } from './door-kinds.js';
import type { Entry, EntryChange } from './entry.js';
import type { InheritedDescriptors, KeptDescriptors } from './handover/descriptors.js';
import { handOverVtpm } from './handover/hand-over-vtpm.js';
import type { VtpmHandOver } from './handover/state.js';
import { Travels } from './migration/travels.js';
import { elsewhere, isElsewhere, sayBusy } from './migration/whereabouts.js';
import { Operations } from './operations.js';
import type { VtpmContext, VtpmState } from './vtpm-state.js';
import { type Attendant, VtpmStatus } from './vtpm-status.js';
import { type VtpmView, viewOf } from './vtpm-view.js';
import { VtpmWorkers } from './vtpm-workers.js';

/** A worker reads its control channel at once; one that does not will not be asked twice. */
const HEARD_LIMIT_MS = 5_000;

/** One vTPM: its entry in the list, and what is done with it. */
export class Vtpm {
  /** To another host, and from one. */
  readonly travels: Travels;
  readonly #context: VtpmContext;
  readonly #status: VtpmStatus;
  readonly #operations: Operations;
  readonly #workers: VtpmWorkers;

  constructor(context: VtpmContext, entry: Entry) {
    this.#context = context;
    this.#status = new VtpmStatus(context, entry);
    this.#operations = new Operations(entry.name, (operation) => sayBusy(this.entry, operation));
    this.#workers = new VtpmWorkers(context, this.#status, this.#operations);
    const workers = this.#workers.travel;
    this.travels = new Travels({ context, status: this.#status, operations: this.#operations, workers });
  }

  /** One that the program before this one looked after. */
  static async adopt(
    context: VtpmContext,
    entry: Entry,
    before: VtpmHandOver,
    inherited: InheritedDescriptors,
  ): Promise<Vtpm> {
    const vtpm = new Vtpm(context, entry);
    const status = vtpm.#status;
    status.lingering = before.lingering;
    status.vmm = before.vmm ?? undefined;
    if (before.served) await vtpm.#workers.adopt(before, before.served, inherited);
    else if (status.state.kind === 'stopped') status.state = { kind: 'stopped', reason: before.reason };
    return vtpm;
  }

  get entry(): Entry {
    return this.#status.entry;
  }

  get state(): VtpmState['kind'] {
    return this.#status.state.kind;
  }

  /** @param look at the layers of its worker: as they were seen last, or as they are now */
  view(look: 'last' | 'now' = 'last'): VtpmView {
    return viewOf(this.#status, this.#context.confinements, look === 'now');
  }

  /**
   * A power-on: a new VM run, a new worker. Resolves when the doors are open.
   * @throws ToolstackError `busy` | `already-running` | `worker-failed` | `image-not-allowed` | `image-changed` | `manager-unreachable` | …
   */
  start(attendant?: Attendant): Promise<void> {
    // The pool makes nothing while a start takes from it; a VM takes nothing, and long.
    return this.#operations.exclusively('started', () =>
      this.#status.entry.isolation === 'vm'
        ? this.#start(attendant)
        : this.#context.pool.duringStart(() => this.#start(attendant)),
    );
  }

  /** The program before this one started it for somebody, who is there again. @throws ToolstackError `already-running` | `not-running` */
  attendAgain(attendant: Attendant): void {
    const { name } = this.entry;
    if (this.#status.attendant) {
      throw new ToolstackError(
        'already-running',
        `vTPM ${name} is held by another swtpm; there is one of each`,
      );
    }
    if (this.state === 'stopped' || this.state === 'crashed') {
      throw new ToolstackError('not-running', `vTPM ${name} is ${this.state}`);
    }
    this.#status.attendant = attendant;
  }

  /** Numbers of those that are open. */
  get connections(): number[] {
    const { state } = this.#status;
    return 'doors' in state ? state.doors.visits().map(({ id }) => id) : [];
  }

  /** When what is being done with it has been, whatever came of it. */
  get settled(): Promise<void> {
    return this.#operations.settled;
  }

  get isAttended(): boolean {
    return this.#status.attendant !== undefined;
  }

  /** A connection that its attendant accepted. @returns its id @throws ToolstackError `not-running` | `busy` */
  admit(door: DoorName, fd: number): number {
    const { state } = this.#status;
    if ('doors' in state && state.kind !== 'stopping') return state.doors.admit(door, fd);
    closeSync(fd);
    throw new ToolstackError('not-running', `vTPM ${this.entry.name} is ${state.kind}`);
  }

  /** Resolves when the worker has saved and ended, or was killed for taking too long; `reason` says so then. */
  stop(): Promise<void> {
    return this.#operations.exclusively('stopped', async () => {
      const state = this.#status.state;
      if (state.kind === 'running') {
        const { worker, doors } = state;
        this.#status.state = { kind: 'stopping', worker, doors };
        doors.closeEntrances();
        const limit = this.#context.settings['worker-stop-timeout'];
        const end = await worker.stop(limit);
        doors.close();
        this.#workers.run?.end();
        this.#status.lingering = end.lingering;
        const reason = end.clean ? null : `it did not stop cleanly (${end.reason})`;
        if (reason) this.#status.log.warn({ reason }, 'stopped by force');
        else this.#status.log.info('stopped');
        this.#status.state = { kind: 'stopped', reason };
      } else if (state.kind === 'lost' || state.kind === 'restarting') {
        await this.#workers.breakOff(state);
      } else if (isElsewhere(state)) {
        throw elsewhere(this.entry, state);
      } else {
        this.#status.state = { kind: 'stopped', reason: null };
      }
      if (this.#status.entry.crashed !== null || this.#status.entry.runningInBoot !== null) {
        this.#status.update({ crashed: null, runningInBoot: null });
      }
    });
  }

  /** The next start is with it. @throws ToolstackError `not-stopped` | `busy` | `bad-request` */
  change(change: EntryChange): Promise<void> {
    return this.#operations.exclusively('changed', async () => {
      this.#expectStopped();
      if (change.doors) this.checkDoors(change.doors);
      this.#status.update(change);
    });
  }

  /** Whether it can have them. @throws ToolstackError `bad-request` */
  checkDoors(doors: readonly DoorKind[]): void {
    const { name, isolation, dropin } = this.entry;
    checkDoors(doors, isolation);
    if (!dropin || doors.includes('control')) return;
    throw new ToolstackError(
      'bad-request',
      `vTPM ${name} is started by swtpm, which needs the door "control"; vtpmctl dropin ${name} --remove first`,
    );
  }

  /**
   * Runs `forget` while nothing else can happen to the vTPM.
   * @param hasNotCome its arrival came to nothing @throws ToolstackError `not-stopped` | `busy`
   */
  remove(forget: () => void, hasNotCome = false): Promise<void> {
    return this.#operations.exclusively('removed', async () => {
      const { kind } = this.#status.state;
      if (kind !== 'moved' && !(hasNotCome && kind === 'arriving')) this.#expectStopped();
      forget();
      this.#operations.removed();
    });
  }

  #expectStopped(): void {
    const { state } = this.#status;
    if (state.kind === 'stopped' || state.kind === 'crashed') return;
    if (isElsewhere(state)) throw elsewhere(this.entry, state);
    throw new ToolstackError('not-stopped', `vTPM ${this.entry.name} is ${this.state}; stop it first`);
  }

  /** For the end of the supervisor: a start under way is broken off, a worker that serves is stopped. */
  async shutDown(): Promise<void> {
    this.travels.cancelDeparture();
    await this.#workers.breakOffStart();
    await this.#operations.settled;
    const state = this.#status.state;
    if (state.kind === 'running') await this.stop();
    await this.travels.breakOff();
    if (state.kind !== 'lost' && state.kind !== 'restarting') return;
    await this.#workers.breakOff(state);
    // Its VM may still run, and must not be given a TPM with fresh PCRs by the next supervisor.
    this.#status.crashed(state.reason);
  }

  async #start(attendant: Attendant | undefined): Promise<void> {
    if (this.entry.dropin && !attendant) {
      const { place } = this.entry.dropin;
      throw new ToolstackError(
        'bad-request',
        `vTPM ${this.entry.name} is started by swtpm with the token in ${place}, and by nobody else`,
      );
    }
    if (isElsewhere(this.#status.state)) throw elsewhere(this.entry, this.#status.state);
    if (this.#status.state.kind === 'running' || this.#status.state.kind === 'restarting') {
      throw new ToolstackError('already-running', `vTPM ${this.#status.entry.name} is running already`);
    }
    if (this.#status.state.kind === 'lost') await this.#workers.breakOff(this.#status.state);
    const before = this.#status.state;
    const { epoch } = this.#status.entry;
    this.#status.state = { kind: 'starting', worker: undefined };
    try {
      await this.#workers.powerOn();
      this.#status.attendant = attendant;
    } catch (error) {
      this.#workers.run?.end();
      const failure = ToolstackError.from(error, `vTPM ${this.#status.entry.name} cannot be started`);
      this.#status.log.warn({ code: failure.code, reason: failure.message }, 'not started');
      if (this.#status.entry.crashed === null) {
        this.#status.state = { kind: 'stopped', reason: `the last start failed: ${failure.message}` };
        if (this.#status.entry.runningInBoot !== null) this.#status.tryUpdate({ runningInBoot: null, epoch });
      } else {
        this.#status.state = before;
      }
      throw failure;
    }
  }

  /** Nothing begins until `release`. Resolves when what is under way has settled, and the worker has heard everything. */
  async hold(): Promise<void> {
    this.#operations.hold();
    await this.#operations.settled;
    await this.#workers.settled;
    const { state } = this.#status;
    if (state.kind === 'running' || state.kind === 'lost') await state.worker.whenHeard(HEARD_LIMIT_MS);
  }

  release(): void {
    if (!this.#operations.isHeld) return;
    this.#operations.release();
    this.#workers.released();
  }

  /** What is being done with it, undefined where nothing is. */
  get operation(): string | undefined {
    return this.#operations.current ?? (this.state === 'restarting' ? 'restarted' : undefined);
  }

  /** What the next program needs to know of it. Only while held. @throws ToolstackError `busy` */
  handOver(kept: KeptDescriptors): VtpmHandOver {
    return handOverVtpm(this.#status, this.#workers.run, kept);
  }
}
