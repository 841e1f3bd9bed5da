import { setTimeout as delay } from 'node:timers/promises';
import { CheckpointStore } from './checkpoint-store.js';
import type { InheritedDescriptors, KeptDescriptors } from './handover/descriptors.js';
import type { RunHandOver } from './handover/state.js';
import { RestartBudget } from './restart-budget.js';

/** Workers in a row that end without having given an answer, each within a minute of the one before. */
const MOST_FUTILE = 5;
const FUTILE_WINDOW_MS = 60_000;
/** Clients whose end is remembered; of those before, the worker of that time was told. */
const MOST_GONE = 4096;
const FIRST_PAUSE_MS = 50;
const LONGEST_PAUSE_MS = 5_000;

/** One power-on of a VM, over all workers that serve it. */
export class VmRun {
  readonly checkpoint: CheckpointStore;
  /** Processes of clients that have ended. What they left in the TPM goes with the next worker at the latest. */
  readonly #gone: Set<number>;
  readonly #budget: RestartBudget;
  readonly #stopping = new AbortController();
  #futile: number;
  #answers: number;
  #endedAt = performance.now();

  /** Why its state is lost, where it is: every command is answered with TPM_RC_FAILURE until the next run. */
  lost: string | undefined;

  /** @param burst restarts that may come at once */
  constructor(burst: number, checkpoint: CheckpointStore, before?: RunHandOver) {
    this.#budget = new RestartBudget(burst);
    this.checkpoint = checkpoint;
    this.#gone = new Set(before?.clientsGone);
    this.#futile = before?.futile ?? 0;
    this.#answers = before?.answers ?? 0;
    this.lost = before?.lost ?? undefined;
  }

  /** One of the program before this one, with a budget that is full again. @throws ToolstackError `corrupt` */
  static adopt(burst: number, before: RunHandOver, inherited: InheritedDescriptors): VmRun {
    return new VmRun(burst, CheckpointStore.adopt(before, inherited), before);
  }

  /** What the next program needs to know of it. */
  handOver(kept: KeptDescriptors): RunHandOver {
    return {
      ...this.checkpoint.handOver(kept),
      futile: this.#futile,
      answers: this.#answers,
      clientsGone: [...this.#gone],
      lost: this.lost ?? null,
    };
  }

  get isOver(): boolean {
    return this.#stopping.signal.aborted;
  }

  /** Aborted where the run is over, or `broken` is aborted. */
  endOr(broken: AbortSignal): AbortSignal {
    return AbortSignal.any([this.#stopping.signal, broken]);
  }

  /** A worker ended unasked. @returns false where it is the last of too many that did nothing */
  mayRestart(): boolean {
    this.#budget.spend();
    const answers = this.checkpoint.answers();
    const now = performance.now();
    const isOther = answers > this.#answers || now - this.#endedAt > FUTILE_WINDOW_MS;
    this.#futile = isOther ? 0 : this.#futile + 1;
    this.#endedAt = now;
    this.#answers = Math.max(answers, this.#answers);
    return this.#futile <= MOST_FUTILE;
  }

  /** Milliseconds until the next try: longer with each that did nothing, and where there were too many, whatever they did. */
  get restartPauseMs(): number {
    const futileMs = this.#futile <= 1 ? 0 : Math.min(FIRST_PAUSE_MS * 2 ** this.#futile, LONGEST_PAUSE_MS);
    return Math.max(futileMs, this.#budget.waitMs);
  }

  get isRestartedTooOften(): boolean {
    return this.#budget.waitMs > 0;
  }

  /** Resolves after that many milliseconds, or where the run is over or `broken` is aborted. */
  async pause(ms: number, broken: AbortSignal): Promise<void> {
    if (ms <= 0) return;
    await delay(ms, undefined, { signal: this.endOr(broken) }).catch(() => undefined);
  }

  clientGone(pid: number): void {
    this.#gone.add(pid);
    if (this.#gone.size <= MOST_GONE) return;
    for (const oldest of this.#gone) {
      this.#gone.delete(oldest);
      return;
    }
  }

  /** A process id is given again. */
  clientCame(pid: number): void {
    this.#gone.delete(pid);
  }

  get clientsGone(): ReadonlySet<number> {
    return this.#gone;
  }

  /** Nothing of it is used any more. */
  end(): void {
    if (this.isOver) return;
    this.#stopping.abort();
    this.checkpoint.close();
  }
}
