import { randomUUID } from 'node:crypto';
import { join } from 'node:path';
import { bootId } from 'vtpm-common';
import { ToolstackError } from '../error.js';
import { CheckpointStore } from './checkpoint-store.js';
import type { VmmChoice, WorkerMessage } from './control-protocol.js';
import { accessOf } from './door-access.js';
import { doorEvents, passVisit, takeDataChannel } from './door-events.js';
import { type DoorPlan, Doors } from './doors.js';
import type { InheritedDescriptors } from './handover/descriptors.js';
import type { VtpmHandOver } from './handover/state.js';
import { arriveLive, type Coming } from './migration/live-arrival.js';
import { VmmTravel } from './migration/vmm-travel.js';
import { killAndWait } from './processes.js';
import { isFinal, isHopeless, isOutdated, passingRetryMs, presumedWrong, wasLost } from './restart-policy.js';
import { type ResetParts, resetLost } from './vm-reset.js';
import { VmRun } from './vm-run.js';
import type { VtpmContext, VtpmState } from './vtpm-state.js';
import type { VtpmStatus } from './vtpm-status.js';
import type { WorkerEnd } from './worker-end.js';
import type { ClaimedWorker } from './worker-pool.js';
import type { WorkerOwner, WorkerProcess } from './worker-process.js';
import { giveIdentity, giveLoss, type StartParts } from './worker-start.js';

const UNKEPT = 'and nothing is check-pointed';
const TOO_OFTEN = 'it was restarted too often, the next worker comes within ten seconds';

interface Gate {
  readonly isHeld: boolean;
  /** Aborted while it is held. */
  readonly held: AbortSignal;
}

/** Connections of a TPM that is frozen wait so long for the host that decides. */
const PATIENCE_MS = 300_000;

/** The workers that serve one vTPM, one after another, and the connections that outlive them. */
export class VtpmWorkers {
  readonly #context: VtpmContext;
  readonly #status: VtpmStatus;
  readonly #gate: Gate;
  /** While there is a worker, or there is to be one. */
  #run: VmRun | undefined;
  #restart: Promise<void> = Promise.resolve();
  #isShuttingDown = false;
  #isResetting = false;
  /** The TPM is being frozen: when its worker ends, nothing follows until it is known where it goes on. */
  #isLeaving = false;
  /** Aborted where a restart that is under way must not come to its end. */
  #breaking = new AbortController();
  #patience: NodeJS.Timeout | undefined;
  readonly #travel: VmmTravel;

  /** @param gate no restart begins while it is held */
  constructor(context: VtpmContext, status: VtpmStatus, gate: Gate) {
    this.#context = context;
    this.#status = status;
    this.#gate = gate;
    this.#travel = new VmmTravel({
      ...{ context, status },
      claim: (broken) => context.pool.take(status.entry.isolation, this.#owner(), broken),
      newRun: () => this.#newRun(),
      doorPlan: () => this.#doorPlan(),
      startParts: (run) => this.#parts(run),
      watch: (worker) => this.#watch(worker),
    });
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
    const { launcher } = this.#context;
    const processes = before.worker?.processes ?? [];
    try {
      const run = VmRun.adopt(this.#context.settings['restart-burst'], before.run, inherited);
      this.#run = run;
      const events = doorEvents(this.#status, run);
      const doors = Doors.adopt(this.#doorPlan(), events, before.doors, inherited);
      const goOn = (why: string): void => {
        this.#restart = this.#goOn(run, doors, why);
      };
      if (!before.worker) return goOn(reason ?? 'the worker ended');
      try {
        const worker = launcher.adopt(this.#status.entry.isolation, before.worker, inherited, this.#owner());
        if (state === 'lost') this.#status.state = { kind: 'lost', reason: reason ?? '', worker, doors };
        else this.#status.state = { kind: 'running', worker, doors };
        this.#watch(worker);
      } catch (error) {
        this.#status.lingering = [...lingering, ...processes];
        this.#status.log.error({ reason: (error as Error).message }, 'the worker cannot be taken over');
        if (this.#context.settings.checkpoint === 'off')
          run.lost ??= `its worker could not be taken over, ${UNKEPT}`;
        goOn(`its worker could not be taken over (${(error as Error).message})`);
      }
    } catch (error) {
      this.#status.lingering = [...lingering, ...processes];
      await killAndWait(processes).catch(() => undefined);
      this.#run?.end();
      const why = `it could not be taken over (${(error as Error).message})`;
      this.#status.log.error({ reason: why }, 'the vTPM crashed; start it again with a new run of its VM');
      this.#status.crashed(why);
    }
  }

  get run(): VmRun | undefined {
    return this.#run;
  }

  /** When no restart is under way. */
  get settled(): Promise<void> {
    return this.#restart;
  }

  /** A new VM run, and its first worker. Resolves when the doors are open. @throws ToolstackError */
  async powerOn(): Promise<void> {
    await killAndWait(this.#status.lingering);
    this.#status.lingering = [];
    const { pool } = this.#context;
    const { isolation } = this.#status.entry;
    // Before anything is changed: no VM powers on while the manager is away.
    const claimed = await pool.take(isolation, this.#owner());
    this.#run = this.#newRun();
    await this.#startWorker(claimed, this.#run, randomUUID());
  }

  /** For the end of the supervisor: a start under way fails, no fresh worker takes the place of its lost one, and none goes on. */
  async breakOffStart(): Promise<void> {
    this.#isShuttingDown = true;
    this.#breaking.abort();
    const { state } = this.#status;
    const { kind } = state;
    if ((kind === 'starting' || kind === 'arriving' || kind === 'restarting') && 'worker' in state)
      await state.worker?.kill();
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
    this.#isLeaving = true;
    this.#breaking.abort();
    if (this.#status.state.kind === 'restarting') await this.#status.state.worker?.kill();
    await this.#restart;
    if (!this.#isShuttingDown) this.#breaking = new AbortController();
    const { state } = this.#status;
    if (!('doors' in state)) {
      this.#status.state = { kind: 'migrating', reason };
    } else {
      this.#status.state = { kind: 'migrating', reason, doors: state.doors };
      if ('worker' in state && state.worker) await this.#endForGood(state.worker);
      // What a worker in a VM of its own had cannot be passed on.
      if (this.#status.entry.isolation === 'vm') this.#dropConnections(reason);
    }
    await killAndWait(this.#status.lingering);
    this.#status.lingering = [];
  }

  /** What is around it may take longer: nobody waits for that. @throws Error where a process of it cannot be ended */
  async #endForGood(worker: WorkerProcess): Promise<void> {
    try {
      await worker.endProcesses();
    } catch (error) {
      this.#status.lingering = (await worker.ended).lingering;
      throw error;
    }
  }

  /** Before `leave`, where the VM moves too. @param called its VMM needs the TPM here */
  prepareToLeave(called: () => Promise<void>): void {
    if (this.#run) this.#travel.prepareToLeave(this.#run, called);
  }

  /** After `leave`: its VMM is served on. */
  standAway(): void {
    this.#travel.standAway();
  }

  /** Nobody knows yet where it goes on. Connections do not wait for ever. */
  beInDoubt(reason: string): void {
    const { state } = this.#status;
    if (state.kind !== 'migrating' || !('doors' in state)) return;
    this.#status.state = { ...state, reason };
    clearTimeout(this.#patience);
    this.#patience = setTimeout(() => this.#dropConnections(reason), PATIENCE_MS);
  }

  /** It goes on here, where it was frozen. Resolves when a worker serves, or none is to come. */
  async stay(reason: string): Promise<void> {
    this.#isLeaving = false;
    clearTimeout(this.#patience);
    await this.#travel.endStandIn();
    const { state } = this.#status;
    if (state.kind !== 'migrating') return;
    if ('doors' in state && this.#run) this.#restart = this.#goOn(this.#run, state.doors, reason);
    else this.#restart = this.#resume(reason);
    await this.#restart;
  }

  /** As `stay`, where no worker has served it here. */
  async resume(reason: string): Promise<void> {
    this.#restart = this.#resume(reason);
    await this.#restart;
  }

  /** It lives elsewhere: nothing of it is left here. */
  gone(): void {
    this.#isLeaving = false;
    this.#dropConnections('');
  }

  #dropConnections(reason: string): void {
    clearTimeout(this.#patience);
    void this.#travel.endStandIn();
    const { state } = this.#status;
    if ('doors' in state) state.doors.close();
    this.#run?.end();
    if (state.kind === 'migrating') this.#status.state = { kind: 'migrating', reason };
  }

  /** The VM run goes on, of which nothing is left here but what the manager has. */
  async #resume(reason: string): Promise<void> {
    try {
      const run = this.hasRun && this.#run ? this.#run : this.#newRun();
      this.#run = run;
      const doors = await Doors.open(this.#doorPlan(), doorEvents(this.#status, run));
      doors.show();
      await this.#goOn(run, doors, reason);
    } catch (error) {
      this.#status.crashed(ToolstackError.from(error, 'the vTPM cannot go on').message);
    }
  }

  /** A vTPM that comes from another host, frozen: see `arriveLive`. */
  async arrive(coming: Coming, onWaiting: () => Promise<void>): Promise<void> {
    const { pool } = this.#context;
    const claimed = await pool.take(this.#status.entry.isolation, this.#owner());
    const run = this.#newRun();
    this.#run = run;
    await arriveLive(
      {
        ...{ context: this.#context, status: this.#status, claimed, run, onWaiting },
        startParts: this.#parts(run),
        doorPlan: this.#doorPlan(),
        watch: (worker) => this.#watch(worker),
      },
      coming,
    );
  }

  /** As `arrive`, where its VMM brings it. Resolves when that can connect: when it comes, and whether, is not known then. */
  async arriveWithVmm(coming: Coming): Promise<void> {
    this.#run = await this.#travel.arrive(coming);
  }

  /** Its VMM has not brought it yet. */
  get isAwaited(): boolean {
    return this.#travel.isArriving;
  }

  /** A worker of it has left what the next one needs. */
  get hasRun(): boolean {
    return this.#run !== undefined && !this.#run.isOver;
  }

  /** What `arrive` or `arriveWithVmm` began comes to nothing. */
  async comesNot(): Promise<void> {
    if (this.#travel.isArriving) await this.#travel.comesNot();
    this.#run?.end();
  }

  /** A run without a TPM that works: there is nothing to save. */
  async breakOff(state: VtpmState & { kind: 'lost' | 'restarting' }): Promise<void> {
    this.#run?.end();
    const before = state.worker;
    this.#status.state = { kind: 'stopped', reason: null };
    await before?.kill();
    await this.#restart;
    state.doors.close();
  }

  /** The gate is open again. */
  released(): void {
    // After a restart that was under way and is not broken off by holding.
    this.#restart = this.#restart.then(async () => {
      const { state } = this.#status;
      if (state.kind !== 'restarting' || state.worker || !this.#run) return;
      await this.#goOn(this.#run, state.doors, state.reason);
    });
  }

  #newRun(): VmRun {
    const control = this.#status.entry.doors.includes('control');
    return new VmRun(this.#context.settings['restart-burst'], CheckpointStore.create({ control }));
  }

  #owner(): WorkerOwner {
    return {
      logPath: join(this.#context.paths.log, `vtpm-${this.#status.entry.name}.log`),
      log: this.#status.log,
      onMessage: (message) => this.#take(message),
    };
  }

  #doorPlan(): DoorPlan {
    const { entry, doorsDirectory: directory } = this.#status;
    return { directory, access: accessOf(entry), kinds: entry.doors };
  }

  #parts(run: VmRun): StartParts {
    const { office, settings } = this.#context;
    return { office, settings, run, entry: this.#status.entry };
  }

  /** @param presumes that the vTPM is at the manager as the list has it */
  async #startWorker(claimed: ClaimedWorker, run: VmRun, vmRunId: string, presumes = true): Promise<void> {
    const { worker, isFresh } = claimed;
    const { vmRunId: lastRunId, runningInBoot, crashed, epoch: lastEpoch } = this.#status.entry;
    this.#status.state = { kind: 'starting', worker };
    this.#status.vmm = undefined;
    let making: Promise<Doors> | undefined;
    try {
      const { epoch, generation } = await giveIdentity(claimed, {
        ...this.#parts(run),
        entry: { ...this.#status.entry, vmRunId },
        presumes,
        // Before a guest can get in, and while the worker and the manager are busy with the Load.
        onIssued: (issued) => {
          const { epoch } = issued;
          this.#status.update({ vmRunId, runningInBoot: bootId().toString('hex'), crashed: null, epoch });
          making = Doors.open(this.#doorPlan(), doorEvents(this.#status, run));
          making.catch(() => undefined);
        },
      });
      if (!this.#status.entry.manufactured || this.#status.entry.epoch !== epoch) {
        this.#status.update({ manufactured: true, epoch });
      }
      const doors = await (making ?? Doors.open(this.#doorPlan(), doorEvents(this.#status, run)));
      this.#status.state = { kind: 'running', worker, doors };
      doors.show();
      this.#watch(worker);
      this.#status.log.info({ epoch, generation, pid: worker.pid }, 'running');
    } catch (error) {
      const hasEnded = worker.hasEnded;
      const end = await worker.kill();
      this.#status.lingering = end.lingering;
      await making?.then(
        (doors) => doors.close(),
        () => undefined,
      );
      const isPresumedWrong = presumes && presumedWrong(end);
      const isWorkersFault = !isFresh && (hasEnded ? wasLost(end) : isOutdated(error));
      if (this.#isShuttingDown || !(isPresumedWrong || isWorkersFault)) throw error;
      const { pool } = this.#context;
      const { isolation } = this.#status.entry;
      const { reason } = end;
      let other: ClaimedWorker;
      if (isPresumedWrong) {
        this.#status.update({ vmRunId: lastRunId, runningInBoot, crashed, epoch: lastEpoch });
        this.#status.log.info({ reason }, 'the manager is asked, and another worker gets what it says');
        other = await pool.take(isolation, this.#owner());
      } else {
        this.#status.log.warn({ reason }, 'the worker from the pool was lost; a fresh one takes its place');
        other = await pool.fresh(isolation, this.#owner());
      }
      // What the lost one may have left is of a key that the next Load replaces, and its numbers would be taken for newer.
      run.end();
      this.#run = this.#newRun();
      await this.#startWorker(other, this.#run, vmRunId, false);
    }
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
        if (this.#run) takeDataChannel(this.#status, this.#run);
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
        // Held, it is said again.
        if (state.kind === 'lost' && !this.#gate.isHeld && !this.#isResetting)
          this.#resetLost(state, message);
        return;
    }
  }

  #resetLost(lost: VtpmState & { kind: 'lost' }, { bufferSize, locality }: VmmChoice): void {
    const run = this.#run;
    if (!run) return;
    const { pool } = this.#context;
    const { isolation } = this.#status.entry;
    const parts: ResetParts = {
      ...{ status: this.#status, run },
      claim: () => pool.take(isolation, this.#owner(), run.endOr(this.#gate.held)),
      nextRun: () => {
        const next = this.#newRun();
        this.#run = next;
        run.end();
        return next;
      },
      startParts: (next) => this.#parts(next),
      watch: (worker) => this.#watch(worker),
      goOn: (next, doors, reason) => this.#goOn(next, doors, reason),
    };
    this.#isResetting = true;
    this.#restart = this.#restart
      .then(() => resetLost(parts, lost, { bufferSize, locality }))
      .finally(() => {
        this.#isResetting = false;
      });
  }

  /** The worker ended. Where a stop is waiting for that, it deals with it. */
  #ended(worker: WorkerProcess, end: WorkerEnd): void {
    const state = this.#status.state;
    const run = this.#run;
    if ((state.kind !== 'running' && state.kind !== 'lost') || state.worker !== worker || !run) return;
    const { doors } = state;
    this.#status.lingering = end.lingering;
    if (this.#isLeaving) {
      this.#status.state = { kind: 'migrating', reason: end.reason, doors };
      return;
    }
    if (end.clean) {
      doors.close();
      run.end();
      this.#status.state = { kind: 'stopped', reason: null };
      this.#status.tryUpdate({ runningInBoot: null });
      return;
    }
    if (isFinal(this.#status.entry.isolation, end) || !run.mayRestart()) {
      this.#crashed(run, doors, end.reason);
      return;
    }
    this.#status.log.warn({ reason: end.reason }, 'the worker ended; another one goes on');
    if (this.#context.settings.checkpoint === 'off') {
      run.lost ??= `${end.reason}, ${UNKEPT}`;
    }
    this.#restart = this.#goOn(run, doors, end.reason);
  }

  #crashed(run: VmRun, doors: Doors, reason: string): void {
    doors.close();
    run.end();
    this.#status.log.error({ reason }, 'the worker crashed; start the vTPM again with a new run of its VM');
    this.#status.crashed(reason);
  }

  /** Never rejects. Ends early where the run is broken off. */
  async #goOn(run: VmRun, doors: Doors, ended: string): Promise<void> {
    const held = AbortSignal.any([this.#gate.held, this.#breaking.signal]);
    let reason = ended;
    let pauseMs = run.restartPauseMs;
    for (;;) {
      const why = run.isRestartedTooOften ? `${reason}; ${TOO_OFTEN}` : reason;
      this.#status.state = { kind: 'restarting', reason: why, doors, worker: undefined };
      await run.pause(pauseMs, held);
      // The next program, or this one when it is released, goes on.
      if (run.isOver || held.aborted) return;
      try {
        // The dead one cannot run any more (I-3).
        await killAndWait(this.#status.lingering);
        this.#status.lingering = [];
        await this.#context.pool.duringStart(() => this.#tryToGoOn(run, doors, reason));
        return;
      } catch (error) {
        if (run.isOver) return;
        const failure = ToolstackError.from(error, 'no worker goes on');
        reason = failure.message;
        this.#status.log.warn({ code: failure.code, reason }, 'the vTPM does not go on yet');
        const passingMs = held.aborted ? 0 : passingRetryMs(failure);
        if (passingMs === undefined) {
          if (!run.mayRestart()) return this.#crashed(run, doors, reason);
          if (isHopeless(failure)) run.lost ??= `${ended}; ${reason}`;
        }
        pauseMs = passingMs ?? run.restartPauseMs;
      }
    }
  }

  async #tryToGoOn(run: VmRun, doors: Doors, reason: string): Promise<void> {
    const broken = run.endOr(AbortSignal.any([this.#gate.held, this.#breaking.signal]));
    const claimed = await this.#context.pool.take(this.#status.entry.isolation, this.#owner(), broken);
    const { worker } = claimed;
    if (run.isOver) {
      await worker.kill();
      return;
    }
    const state: VtpmState = { kind: 'restarting', reason, doors, worker };
    this.#status.state = state;
    try {
      doors.lookForGone();
      // Those that come from here on wait until the worker is there.
      const visits = doors.visits();
      if (run.lost !== undefined) {
        await giveLoss(claimed, run, visits);
      } else {
        const { epoch, generation } = await giveIdentity(claimed, this.#parts(run), visits);
        this.#status.tryUpdate({ epoch });
        this.#status.log.info({ epoch, generation, pid: worker.pid }, 'the vTPM goes on');
      }
      if (run.isOver) throw new ToolstackError('busy', 'the vTPM is being stopped');
      this.#status.state =
        run.lost === undefined
          ? { kind: 'running', worker, doors }
          : { kind: 'lost', reason: run.lost, worker, doors };
      if (run.lost !== undefined) {
        this.#status.log.error(
          { reason: run.lost },
          'the TPM fails until the VM is reset: start the vTPM again then',
        );
      }
      const known = new Set(visits.map(({ id }) => id));
      for (const visit of doors.visits()) if (!known.has(visit.id)) passVisit(this.#status, run, visit);
      this.#watch(worker);
    } catch (error) {
      state.worker = undefined;
      const end = await worker.kill();
      this.#status.lingering = end.lingering;
      throw error;
    }
  }
}
