import { randomUUID } from 'node:crypto';
import { join } from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { bootId, type Logger, socketFd } from 'vtpm-common';
import { ToolstackError, type ToolstackErrorCode } from '../error.js';
import { vmLayers } from '../vm/layers.js';
import type { WorkerMessage } from './control-protocol.js';
import { accessOf } from './door-access.js';
import { type DoorEvents, Doors, doorPaths, type Visit } from './doors.js';
import type { Entry } from './entry.js';
import type { InheritedDescriptors, KeptDescriptors } from './handover/descriptors.js';
import type { VtpmHandOver } from './handover/state.js';
import { confinementOf } from './layers.js';
import { killAndWait, type ProcessId } from './processes.js';
import { VmRun } from './vm-run.js';
import type { VtpmList } from './vtpm-list.js';
import type { VtpmContext, VtpmState, VtpmView } from './vtpm-state.js';
import type { ClaimedWorker } from './worker-pool.js';
import type { WorkerEnd, WorkerOwner, WorkerProcess } from './worker-process.js';
import { giveIdentity, giveLoss, isOfTheDead, type StartParts } from './worker-start.js';

/** What a worker says when it ends because it may not go on, or because nobody could in its place. */
const FINAL: ReadonlySet<string> = new Set(['fenced', 'refused']);

/** Failures of a restart that pass. */
const PASSING: ReadonlySet<ToolstackErrorCode> = new Set(['manager-unreachable', 'locked']);
const PASSING_RETRY_MS = 200;
/** A worker reads its control channel at once; one that does not will not be asked twice. */
const HEARD_LIMIT_MS = 5_000;
const UNKEPT = 'and nothing is check-pointed';

/** One vTPM: its entry in the list, and its worker while it has one. */
export class Vtpm {
  readonly #context: VtpmContext;
  readonly #log: Logger;
  #entry: Entry;
  #state: VtpmState;
  /** What a kill could not end. No start while it is there. */
  #lingering: readonly ProcessId[] = [];
  /** While there is a worker, or there is to be one. */
  #run: VmRun | undefined;
  #restart: Promise<void> = Promise.resolve();
  #operation: { readonly name: string; readonly settled: Promise<void> } | undefined;
  #isRemoved = false;
  #isShuttingDown = false;
  #isHeld = false;

  constructor(context: VtpmContext, entry: Entry) {
    this.#context = context;
    this.#log = context.log.child({ vtpm: entry.name });
    this.#entry = entry;
    this.#state =
      entry.crashed === null ? { kind: 'stopped', reason: null } : { kind: 'crashed', reason: entry.crashed };
  }

  /**
   * One that the program before this one looked after. A worker that cannot be taken over is killed, and another one goes on
   * when nothing of it is left (I-3).
   */
  static async adopt(
    context: VtpmContext,
    entry: Entry,
    before: VtpmHandOver,
    inherited: InheritedDescriptors,
  ): Promise<Vtpm> {
    const vtpm = new Vtpm(context, entry);
    vtpm.#lingering = before.lingering;
    if (before.served) await vtpm.#takeOver(before, before.served, inherited);
    else if (vtpm.#state.kind === 'stopped') vtpm.#state = { kind: 'stopped', reason: before.reason };
    return vtpm;
  }

  get entry(): Entry {
    return this.#entry;
  }

  get state(): VtpmState['kind'] {
    return this.#state.kind;
  }

  view(): VtpmView {
    const { id, name, vmUuid, isolation, autostart, startup, vmRunId, epoch } = this.#entry;
    const { socketOwner, socketMode } = this.#entry;
    const state = this.#state;
    const worker = 'worker' in state ? state.worker : undefined;
    return {
      ...{ id, name, vmUuid, isolation, autostart, startup, socketOwner, socketMode },
      state: state.kind,
      reason: 'reason' in state ? state.reason : null,
      ...{ vmRunId, epoch },
      worker:
        worker?.pid === undefined
          ? null
          : {
              pid: worker.pid,
              isolation,
              ...this.#confinementOf(worker.pid),
              startedAt: worker.startedAt.toISOString(),
            },
      sockets: { ...doorPaths(this.#directory()), control: null, ring: null },
    };
  }

  /**
   * A power-on: a new VM run, a new worker. Resolves when the doors are open.
   * @throws ToolstackError `busy` | `already-running` | `worker-failed` | `image-not-allowed` | `image-changed` | `manager-unreachable` | …
   */
  start(): Promise<void> {
    // The pool makes nothing while a start takes from it; a VM takes nothing, and long.
    return this.#exclusively('started', () =>
      this.#entry.isolation === 'vm' ? this.#start() : this.#context.pool.duringStart(() => this.#start()),
    );
  }

  /** Resolves when the worker has saved and ended, or was killed for taking too long; `reason` says so then. */
  stop(): Promise<void> {
    return this.#exclusively('stopped', async () => {
      const state = this.#state;
      if (state.kind === 'running') {
        const { worker, doors } = state;
        this.#state = { kind: 'stopping', worker, doors };
        doors.closeEntrances();
        const limit = this.#context.settings['worker-stop-timeout'];
        const end = await worker.stop(limit);
        doors.close();
        this.#run?.end();
        this.#lingering = end.lingering;
        const reason = end.clean ? null : `it did not stop cleanly (${end.reason})`;
        if (reason) this.#log.warn({ reason }, 'stopped by force');
        else this.#log.info('stopped');
        this.#state = { kind: 'stopped', reason };
      } else if (state.kind === 'lost' || state.kind === 'restarting') {
        await this.#breakOff(state);
      } else {
        this.#state = { kind: 'stopped', reason: null };
      }
      if (this.#entry.crashed !== null || this.#entry.runningInBoot !== null) {
        this.#update({ crashed: null, runningInBoot: null });
      }
    });
  }

  /** Runs `forget` while nothing else can happen to the vTPM. @throws ToolstackError `not-stopped` | `busy` */
  remove(forget: () => void): Promise<void> {
    return this.#exclusively('removed', async () => {
      if (this.#state.kind !== 'stopped' && this.#state.kind !== 'crashed') {
        throw new ToolstackError(
          'not-stopped',
          `vTPM ${this.#entry.name} is ${this.#state.kind}; stop it first`,
        );
      }
      forget();
      this.#isRemoved = true;
    });
  }

  /** For the end of the supervisor: a start under way is broken off, a worker that serves is stopped. */
  async shutDown(): Promise<void> {
    this.#isShuttingDown = true;
    if (this.#state.kind === 'starting') await this.#state.worker?.kill();
    await this.#operation?.settled;
    const state = this.#state;
    if (state.kind === 'running') await this.stop();
    if (state.kind !== 'lost' && state.kind !== 'restarting') return;
    await this.#breakOff(state);
    // Its VM may still run, and must not be given a TPM with fresh PCRs by the next supervisor.
    this.#state = { kind: 'crashed', reason: state.reason };
    this.#tryUpdate({ crashed: state.reason });
  }

  /** A run without a TPM that works: there is nothing to save. */
  async #breakOff(state: VtpmState & { kind: 'lost' | 'restarting' }): Promise<void> {
    this.#run?.end();
    const before = state.worker;
    this.#state = { kind: 'stopped', reason: null };
    await before?.kill();
    await this.#restart;
    state.doors.close();
  }

  async #start(): Promise<void> {
    if (this.#state.kind === 'running' || this.#state.kind === 'restarting') {
      throw new ToolstackError('already-running', `vTPM ${this.#entry.name} is running already`);
    }
    if (this.#state.kind === 'lost') await this.#breakOff(this.#state);
    const before = this.#state;
    const { epoch } = this.#entry;
    this.#state = { kind: 'starting', worker: undefined };
    try {
      await killAndWait(this.#lingering);
      this.#lingering = [];
      const { pool } = this.#context;
      const { isolation } = this.#entry;
      // Before anything is changed: no VM powers on while the manager is away.
      const claimed = await pool.take(isolation, this.#owner());
      this.#run = new VmRun();
      await this.#startWorker(claimed, this.#run, randomUUID());
    } catch (error) {
      this.#run?.end();
      const failure = ToolstackError.from(error, `vTPM ${this.#entry.name} cannot be started`);
      this.#log.warn({ code: failure.code, reason: failure.message }, 'not started');
      if (this.#entry.crashed === null) {
        this.#state = { kind: 'stopped', reason: `the last start failed: ${failure.message}` };
        if (this.#entry.runningInBoot !== null) this.#tryUpdate({ runningInBoot: null, epoch });
      } else {
        this.#state = before;
      }
      throw failure;
    }
  }

  #confinementOf(pid: number): Pick<NonNullable<VtpmView['worker']>, 'profile' | 'layers' | 'waived'> {
    const { profile, waived } = this.#context.confinements;
    const isSandbox = this.#entry.isolation !== 'none';
    const layers = vmLayers(pid, confinementOf(pid, waived));
    return { profile, layers, waived: isSandbox ? [...waived] : [] };
  }

  /** Nothing begins until `release`. Resolves when what is under way has settled, and the worker has heard everything. */
  async hold(): Promise<void> {
    this.#isHeld = true;
    await this.#operation?.settled;
    await this.#restart;
    const state = this.#state;
    if (state.kind === 'running' || state.kind === 'lost') await state.worker.whenHeard(HEARD_LIMIT_MS);
  }

  release(): void {
    if (!this.#isHeld) return;
    this.#isHeld = false;
    // After a restart that was under way and is not broken off by `hold`.
    this.#restart = this.#restart.then(async () => {
      const state = this.#state;
      if (state.kind !== 'restarting' || state.worker || !this.#run) return;
      await this.#goOn(this.#run, state.doors, state.reason);
    });
  }

  /** What is being done with it, undefined where nothing is. */
  get operation(): string | undefined {
    return this.#operation?.name ?? (this.#state.kind === 'restarting' ? 'restarted' : undefined);
  }

  /** What the next program needs to know of it. Only while held. @throws ToolstackError `busy` */
  handOver(kept: KeptDescriptors): VtpmHandOver {
    const state = this.#state;
    const lingering = this.#lingering.map(({ pid, startTime }) => ({ pid, startTime }));
    const common = { id: this.#entry.id, lingering };
    if (state.kind === 'stopped' || state.kind === 'crashed') {
      return { ...common, state: state.kind, reason: state.reason, served: null };
    }
    if (state.kind === 'starting' || state.kind === 'stopping' || !this.#run) {
      throw new ToolstackError('busy', `vTPM ${this.#entry.name} is ${state.kind}; try again later`);
    }
    const reason = state.kind === 'running' ? null : state.reason;
    const worker = state.worker?.handOver(kept) ?? null;
    const served = { run: this.#run.handOver(kept), doors: state.doors.handOver(kept), worker };
    return { ...common, state: state.kind, reason, served };
  }

  /** All at once: neither the worker nor a guest can say anything before both are in place. */
  async #takeOver(
    { state, reason, lingering }: VtpmHandOver,
    before: NonNullable<VtpmHandOver['served']>,
    inherited: InheritedDescriptors,
  ): Promise<void> {
    const { launcher } = this.#context;
    const processes = before.worker?.processes ?? [];
    try {
      const run = VmRun.adopt(before.run, inherited);
      this.#run = run;
      const events = this.#doorEvents(run);
      const doors = Doors.adopt(this.#directory(), accessOf(this.#entry), events, before.doors, inherited);
      const goOn = (why: string): void => {
        this.#restart = this.#goOn(run, doors, why);
      };
      if (!before.worker) return goOn(reason ?? 'the worker ended');
      try {
        const worker = launcher.adopt(this.#entry.isolation, before.worker, inherited, this.#owner());
        if (state === 'lost') this.#state = { kind: 'lost', reason: reason ?? '', worker, doors };
        else this.#state = { kind: 'running', worker, doors };
        this.#watch(worker);
      } catch (error) {
        this.#lingering = [...lingering, ...processes];
        this.#log.error({ reason: (error as Error).message }, 'the worker cannot be taken over');
        if (this.#context.settings.checkpoint === 'off')
          run.lost ??= `its worker could not be taken over, ${UNKEPT}`;
        goOn(`its worker could not be taken over (${(error as Error).message})`);
      }
    } catch (error) {
      this.#lingering = [...lingering, ...processes];
      await killAndWait(processes).catch(() => undefined);
      this.#run?.end();
      const why = `it could not be taken over (${(error as Error).message})`;
      this.#log.error({ reason: why }, 'the vTPM crashed; start it again with a new run of its VM');
      this.#state = { kind: 'crashed', reason: why };
      this.#tryUpdate({ crashed: why });
    }
  }

  #owner(): WorkerOwner {
    return {
      logPath: join(this.#context.paths.log, `vtpm-${this.#entry.name}.log`),
      log: this.#log,
      onMessage: (message) => this.#take(message),
    };
  }

  #parts(run: VmRun): StartParts {
    const { office, settings } = this.#context;
    return { office, settings, run, entry: this.#entry };
  }

  async #startWorker(claimed: ClaimedWorker, run: VmRun, vmRunId: string): Promise<void> {
    const { worker, isFresh } = claimed;
    this.#state = { kind: 'starting', worker };
    try {
      const { epoch, generation } = await giveIdentity(claimed, {
        ...this.#parts(run),
        entry: { ...this.#entry, vmRunId },
        // Before a guest can get in, and while the worker and the manager are busy with the Load.
        onIssued: (issued) => {
          this.#update({
            ...{ vmRunId, runningInBoot: bootId().toString('hex'), crashed: null },
            ...{ epoch: issued.epoch, manufactured: this.#entry.manufactured || issued.generation > 0 },
          });
        },
      });
      if (!this.#entry.manufactured || this.#entry.epoch !== epoch) {
        this.#update({ manufactured: true, epoch });
      }
      this.#serve(worker, await Doors.open(this.#directory(), accessOf(this.#entry), this.#doorEvents(run)));
      this.#log.info({ epoch, generation, pid: worker.pid }, 'running');
    } catch (error) {
      const hasEnded = worker.hasEnded;
      const end = await worker.kill();
      this.#lingering = end.lingering;
      const isWorkersFault = hasEnded ? wasLost(end) : isOutdated(error);
      if (isFresh || this.#isShuttingDown || !isWorkersFault) throw error;
      this.#log.warn(
        { reason: end.reason },
        'the worker from the pool was lost; a fresh one takes its place',
      );
      const fresh = await this.#context.pool.fresh(this.#entry.isolation, this.#owner());
      await this.#startWorker(fresh, run, vmRunId);
    }
  }

  /** A connection waits while there is no worker: the next one gets all that are open. */
  #connected(run: VmRun, { door, id, peer, socket }: Visit): void {
    if (peer !== undefined) run.clientCame(peer);
    const state = this.#state;
    if (state.kind !== 'running' && state.kind !== 'lost') return;
    try {
      state.worker.pass(socketFd(socket), { type: 'connection', door, id, peer });
    } catch (error) {
      // The next worker gets all that are open.
      if (!isOfTheDead(error)) throw error;
    }
  }

  #doorEvents(run: VmRun): DoorEvents {
    return {
      connected: (visit) => this.#connected(run, visit),
      peerGone: (peer) => {
        run.clientGone(peer);
        if ('worker' in this.#state) this.#state.worker?.send({ type: 'peer-gone', peer });
      },
    };
  }

  #serve(worker: WorkerProcess, doors: Doors): void {
    this.#state = { kind: 'running', worker, doors };
    this.#watch(worker);
  }

  #watch(worker: WorkerProcess): void {
    void worker.ended.then((end) => this.#ended(worker, end));
  }

  #take(message: WorkerMessage): void {
    if (message.type === 'connection-closed' && 'doors' in this.#state) {
      this.#state.doors.forget(message.id);
    }
  }

  /** The worker ended. Where a stop is waiting for that, it deals with it. */
  #ended(worker: WorkerProcess, end: WorkerEnd): void {
    const state = this.#state;
    const run = this.#run;
    if ((state.kind !== 'running' && state.kind !== 'lost') || state.worker !== worker || !run) return;
    const { doors } = state;
    this.#lingering = end.lingering;
    if (end.clean) {
      doors.close();
      run.end();
      this.#state = { kind: 'stopped', reason: null };
      this.#tryUpdate({ runningInBoot: null });
      return;
    }
    if (this.#entry.isolation === 'vm' || FINAL.has(end.failure?.reason ?? '') || !run.mayRestart()) {
      this.#crashed(run, doors, end.reason);
      return;
    }
    this.#log.warn({ reason: end.reason }, 'the worker ended; another one goes on');
    if (this.#context.settings.checkpoint === 'off') {
      run.lost ??= `${end.reason}, ${UNKEPT}`;
    }
    this.#restart = this.#goOn(run, doors, end.reason);
  }

  #crashed(run: VmRun, doors: Doors, reason: string): void {
    doors.close();
    run.end();
    this.#log.error({ reason }, 'the worker crashed; start the vTPM again with a new run of its VM');
    this.#state = { kind: 'crashed', reason };
    this.#tryUpdate({ crashed: reason });
  }

  /** Never rejects. Ends early where the run is broken off. */
  async #goOn(run: VmRun, doors: Doors, ended: string): Promise<void> {
    let reason = ended;
    this.#state = { kind: 'restarting', reason, doors, worker: undefined };
    while (!run.isOver && !this.#isHeld) {
      await run.pause();
      if (this.#isHeld) return;
      try {
        // The dead one cannot run any more (I-3).
        await killAndWait(this.#lingering);
        this.#lingering = [];
        await this.#context.pool.duringStart(() => this.#tryToGoOn(run, doors, reason));
        return;
      } catch (error) {
        if (run.isOver) return;
        const failure = ToolstackError.from(error, 'no worker goes on');
        reason = failure.message;
        this.#log.warn({ code: failure.code, reason }, 'the vTPM does not go on yet');
        // The next program, or this one when it is released, goes on.
        if (this.#isHeld) return;
        if (PASSING.has(failure.code)) await delay(PASSING_RETRY_MS);
        else if (!run.mayRestart()) this.#crashed(run, doors, reason);
        else if (isHopeless(failure)) run.lost ??= `${ended}; ${reason}`;
      }
    }
  }

  async #tryToGoOn(run: VmRun, doors: Doors, reason: string): Promise<void> {
    const claimed = await this.#context.pool.take(this.#entry.isolation, this.#owner());
    const { worker } = claimed;
    if (run.isOver) {
      await worker.kill();
      return;
    }
    const state: VtpmState = { kind: 'restarting', reason, doors, worker };
    this.#state = state;
    try {
      doors.lookForGone();
      // Those that come from here on wait until the worker is there.
      const visits = doors.visits();
      if (run.lost !== undefined) {
        await giveLoss(claimed, run, visits);
      } else {
        const { epoch, generation } = await giveIdentity(claimed, this.#parts(run), visits);
        this.#tryUpdate({ epoch });
        this.#log.info({ epoch, generation, pid: worker.pid }, 'the vTPM goes on');
      }
      if (run.isOver) throw new ToolstackError('busy', 'the vTPM is being stopped');
      this.#state =
        run.lost === undefined
          ? { kind: 'running', worker, doors }
          : { kind: 'lost', reason: run.lost, worker, doors };
      if (run.lost !== undefined) {
        this.#log.error(
          { reason: run.lost },
          'the TPM fails until the VM is reset: start the vTPM again then',
        );
      }
      const known = new Set(visits.map(({ id }) => id));
      for (const visit of doors.visits()) if (!known.has(visit.id)) this.#connected(run, visit);
      this.#watch(worker);
    } catch (error) {
      state.worker = undefined;
      const end = await worker.kill();
      this.#lingering = end.lingering;
      throw error;
    }
  }

  #update(change: Parameters<VtpmList['update']>[1]): void {
    this.#entry = this.#context.list.update(this.#entry.id, change);
  }

  /** For events that nobody waits for. What is not written is found again: `runningInBoot` still stands in the list. */
  #tryUpdate(change: Parameters<VtpmList['update']>[1]): void {
    try {
      this.#update(change);
    } catch (error) {
      this.#log.error({ reason: (error as Error).message }, 'the list of vTPMs cannot be written');
    }
  }

  #directory(): string {
    return join(this.#context.paths.supervisor.doors, this.#entry.name);
  }

  async #exclusively(operation: string, run: () => Promise<void>): Promise<void> {
    if (this.#operation) {
      const { name } = this.#operation;
      throw new ToolstackError('busy', `vTPM ${this.#entry.name} is being ${name}; try again later`);
    }
    if (this.#isRemoved) {
      // Another one may have its id by now, and with it the right to run the only worker (I-3).
      throw new ToolstackError('unknown-vtpm', `vTPM ${this.#entry.name} was removed`);
    }
    if (this.#isHeld) {
      throw new ToolstackError('busy', 'the supervisor is being upgraded; try again in a moment');
    }
    const running = run();
    this.#operation = { name: operation, settled: running.catch(() => undefined) };
    try {
      await running;
    } finally {
      this.#operation = undefined;
    }
  }
}

/** Another try gives the same: what the manager or the delegation refuses, and a state that cannot go on. */
function isHopeless({ code, message }: ToolstackError): boolean {
  const isRefused = code === 'bad-request' || code === 'manager-refused' || code === 'image-not-allowed';
  return isRefused || /^(no-checkpoint|verb-missing|wrong-vm|retired)\b/.test(message);
}

/** The copy that it was started from was touched since: a fresh one is of what is measured now. */
function isOutdated(error: unknown): boolean {
  return error instanceof ToolstackError && error.code === 'image-changed';
}

/** What ended it has to do with the worker or its link, and nothing with the vTPM. */
function wasLost({ failure, lingering }: WorkerEnd): boolean {
  return lingering.length === 0 && (failure === undefined || failure.reason === 'link-lost');
}
