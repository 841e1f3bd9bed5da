import { ToolstackError } from '../error.js';
import type { VmmChoice } from './control-protocol.js';
import { passVisit } from './door-events.js';
import type { Doors } from './doors.js';
import { killAndWait } from './processes.js';
import { isHopeless, passingRetryMs } from './restart-policy.js';
import { resetLost } from './vm-reset.js';
import type { VmRun } from './vm-run.js';
import type { VtpmContext, VtpmState } from './vtpm-state.js';
import type { VtpmStatus } from './vtpm-status.js';
import type { WorkerProcess } from './worker-process.js';
import { giveIdentity, giveLoss } from './worker-start.js';
import type { WorkerSupply } from './worker-supply.js';

const TOO_OFTEN = 'it was restarted too often, the next worker comes within ten seconds';

export interface Gate {
  readonly isHeld: boolean;
  /** Aborted while it is held. */
  readonly held: AbortSignal;
}

export interface RestartsParts {
  readonly context: Pick<VtpmContext, 'pool'>;
  readonly status: VtpmStatus;
  readonly supply: WorkerSupply;
  /** Nothing begins while it is held. */
  readonly gate: Gate;
  /** The worker serves: its end is looked after. */
  watch(worker: WorkerProcess): void;
}

/** Another worker goes on where the one before it has ended, with the same connections; one after the other. */
export class Restarts {
  readonly #parts: RestartsParts;
  #settled: Promise<void> = Promise.resolve();
  #breaking = new AbortController();
  #isClosed = false;
  #isResetting = false;

  constructor(parts: RestartsParts) {
    this.#parts = parts;
  }

  /** When none is under way. */
  get settled(): Promise<void> {
    return this.#settled;
  }

  get isClosed(): boolean {
    return this.#isClosed;
  }

  /** @param work of which `goOn` is a part, and which never rejects */
  begin(work: Promise<void>): Promise<void> {
    this.#settled = work;
    return work;
  }

  /** Resolves when none is under way. Others may follow. */
  async breakOff(): Promise<void> {
    const { status } = this.#parts;
    this.#breaking.abort();
    if (status.state.kind === 'restarting') await status.state.worker?.kill();
    await this.#settled;
    if (!this.#isClosed) this.#breaking = new AbortController();
  }

  /** What is under way comes to no end, and none follows. */
  close(): void {
    this.#isClosed = true;
    this.#breaking.abort();
  }

  /** The gate is open again. */
  released(): void {
    const { status, supply } = this.#parts;
    // After a restart that was under way and is not broken off by holding.
    this.#settled = this.#settled.then(async () => {
      const { state } = status;
      if (state.kind !== 'restarting' || state.worker || !supply.run) return;
      await this.goOn(supply.run, state.doors, state.reason);
    });
  }

  /** The VMM of a TPM that is lost begins a new run of its VM. Where that cannot be now, it is said again. */
  reset(lost: VtpmState & { kind: 'lost' }, { bufferSize, locality }: VmmChoice): void {
    const { status, supply, gate, watch } = this.#parts;
    const { run } = supply;
    if (!run || gate.isHeld || this.#isResetting) return;
    const parts = {
      ...{ status, supply, run, watch },
      claim: () => supply.claim(run.endOr(gate.held)),
      goOn: (next: VmRun, doors: Doors, reason: string) => this.goOn(next, doors, reason),
    };
    this.#isResetting = true;
    this.#settled = this.#settled
      .then(() => resetLost(parts, lost, { bufferSize, locality }))
      .finally(() => {
        this.#isResetting = false;
      });
  }

  /** Never rejects. Ends early where the run is broken off. */
  async goOn(run: VmRun, doors: Doors, ended: string): Promise<void> {
    const { context, status, gate } = this.#parts;
    const held = AbortSignal.any([gate.held, this.#breaking.signal]);
    let reason = ended;
    let pauseMs = run.restartPauseMs;
    for (;;) {
      const why = run.isRestartedTooOften ? `${reason}; ${TOO_OFTEN}` : reason;
      status.state = { kind: 'restarting', reason: why, doors, worker: undefined };
      await run.pause(pauseMs, held);
      // The next program, or this one when it is released, goes on.
      if (run.isOver || held.aborted) return;
      try {
        // The dead one cannot run any more (I-3).
        await killAndWait(status.lingering);
        status.lingering = [];
        await context.pool.duringStart(() => this.#tryToGoOn(run, doors, reason));
        return;
      } catch (error) {
        if (run.isOver) return;
        const failure = ToolstackError.from(error, 'no worker goes on');
        reason = failure.message;
        status.log.warn({ code: failure.code, reason }, 'the vTPM does not go on yet');
        const passingMs = held.aborted ? 0 : passingRetryMs(failure);
        if (passingMs === undefined) {
          if (!run.mayRestart()) return crash(status, run, doors, reason);
          if (isHopeless(failure)) run.lost ??= `${ended}; ${reason}`;
        }
        pauseMs = passingMs ?? run.restartPauseMs;
      }
    }
  }

  async #tryToGoOn(run: VmRun, doors: Doors, reason: string): Promise<void> {
    const { status, supply, gate, watch } = this.#parts;
    const broken = run.endOr(AbortSignal.any([gate.held, this.#breaking.signal]));
    const claimed = await supply.claim(broken);
    const { worker } = claimed;
    if (run.isOver) {
      await worker.kill();
      return;
    }
    const state: VtpmState = { kind: 'restarting', reason, doors, worker };
    status.state = state;
    try {
      doors.lookForGone();
      // Those that come from here on wait until the worker is there.
      const visits = doors.visits();
      if (run.lost !== undefined) {
        await giveLoss(claimed, run, visits);
      } else {
        const { epoch, generation } = await giveIdentity(claimed, supply.startParts(run), visits);
        status.tryUpdate({ epoch });
        status.log.info({ epoch, generation, pid: worker.pid }, 'the vTPM goes on');
      }
      if (run.isOver) throw new ToolstackError('busy', 'the vTPM is being stopped');
      status.state =
        run.lost === undefined
          ? { kind: 'running', worker, doors }
          : { kind: 'lost', reason: run.lost, worker, doors };
      if (run.lost !== undefined) {
        status.log.error(
          { reason: run.lost },
          'the TPM fails until the VM is reset: start the vTPM again then',
        );
      }
      const known = new Set(visits.map(({ id }) => id));
      for (const visit of doors.visits()) if (!known.has(visit.id)) passVisit(status, run, visit);
      watch(worker);
    } catch (error) {
      state.worker = undefined;
      const end = await worker.kill();
      status.lingering = end.lingering;
      throw error;
    }
  }
}

/** No worker goes on in this run. */
export function crash(status: VtpmStatus, run: VmRun, doors: Doors, reason: string): void {
  doors.close();
  run.end();
  status.log.error({ reason }, 'the worker crashed; start the vTPM again with a new run of its VM');
  status.crashed(reason);
}
