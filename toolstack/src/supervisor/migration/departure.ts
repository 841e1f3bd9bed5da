import { barrier, bootId } from 'vtpm-common';
import type { MigrateProgress } from 'vtpm-proto';
import { ToolstackError } from '../../error.js';
import type { VtpmContext } from '../vtpm-state.js';
import type { VtpmStatus } from '../vtpm-status.js';
import { whenItGoesOn } from './going-on.js';
import { type MigrateCall, openMigrateCall } from './migrate-call.js';
import type { Order } from './order.js';
import { outcomeOf, SUPERVISOR_ENDED } from './outcome.js';
import { inDoubt, lineOf, type ProgressLine } from './progress.js';
import type { TravellingWorkers } from './travelling-workers.js';

export interface DepartureParts {
  readonly context: Pick<VtpmContext, 'admin' | 'paths'>;
  readonly status: VtpmStatus;
  readonly workers: TravellingWorkers;
  readonly order: Order;
  onProgress(line: ProgressLine): void;
}

/**
 * One vTPM leaves, or does not. What came of it is durable in the list when its last progress is told; until it is known the
 * entry says that only the manager knows.
 */
export class Departure {
  readonly #parts: DepartureParts;
  #call: MigrateCall | undefined;
  #last: ProgressLine | undefined;
  #reaped: Promise<void> = Promise.resolve();
  #isTooLate = false;
  #isCancelled = false;
  #hasEnded = false;

  constructor(parts: DepartureParts) {
    this.#parts = parts;
  }

  /** @returns false where its state is on its way already */
  cancel(): boolean {
    this.#isCancelled = true;
    this.#call?.cancel();
    return !this.#isTooLate;
  }

  /** Resolves when the last progress was told. @throws ToolstackError where the order is refused: nothing has begun */
  async run(): Promise<void> {
    const { context, status, order } = this.#parts;
    if (!order.isDryRun) {
      const peer = (await context.admin.peerName(order.destination)) ?? order.destination;
      if (this.#isCancelled) {
        throw new ToolstackError(
          'migration-aborted',
          'it was cancelled before it began; the vTPM stays as it is',
        );
      }
      status.update({ migration: { id: order.migration, role: 'departing', peer, isNew: false } });
      barrier('migrate.source.noted');
    }
    let failure: unknown;
    try {
      this.#call = openMigrateCall(context.paths.manager.toolstackSocket, order.signed, (progress) =>
        this.#take(progress),
      );
      await this.#call.ended;
      barrier('migrate.source.ended');
    } catch (error) {
      failure = error;
    }
    this.#hasEnded = true;
    if (!this.#last) {
      // Before the first progress nothing is done.
      if (!order.isDryRun) status.update({ migration: null });
      throw failure ?? new ToolstackError('manager-refused', 'the manager says nothing of the migration');
    }
    if (order.isDryRun) {
      this.#parts.onProgress(failure ? inDoubt(this.#last, failure) : this.#last);
      return;
    }
    // The manager may have given it up before it heard of that, and no worker goes on beside the frozen one.
    await this.#reaped;
    await this.#settle(this.#last, failure);
  }

  #take(progress: MigrateProgress): void {
    const { order, workers } = this.#parts;
    const line = lineOf(progress);
    const { phase } = line;
    this.#last = line;
    if (phase === 'PREPARED' && order.mode === 'VMM' && !order.isDryRun) {
      workers.prepareToLeave(() => this.#wantedBack());
    }
    if (phase === 'FREEZING') workers.expectLeaving();
    if (phase === 'FROZEN') this.#reaped = this.#reap();
    if (phase === 'SENDING' || phase === 'DECIDING') this.#isTooLate = true;
    const isLast = phase === 'COMMITTED' || phase === 'ABORTED' || phase === 'IN_DOUBT';
    // Those are told when they are true here, too.
    if (!isLast && !(order.isDryRun && phase === 'PREPARED')) this.#parts.onProgress(line);
  }

  /** Never rejects. */
  async #reap(): Promise<void> {
    const { status, workers, order } = this.#parts;
    barrier('migrate.source.reaping');
    try {
      await workers.leave(`it goes to ${status.entry.migration?.peer ?? 'another host'}`);
    } catch (error) {
      // Whatever could still run must not be doubled: the manager hears nothing, and gives it up.
      status.log.error({ reason: (error as Error).message }, 'the frozen worker cannot be ended');
      this.#call?.cancel();
      return;
    }
    barrier('migrate.source.reaped');
    this.#call?.reaped();
    if (order.mode === 'VMM') workers.standAway();
  }

  /** Its VM goes on here. Resolves when it is known whether the TPM does; where that cannot be known now, it is asked again. */
  async #wantedBack(): Promise<void> {
    const { context, order, status } = this.#parts;
    status.log.info('its VM wants to go on here: the destination is asked for the vTPM');
    if (!this.#hasEnded) {
      this.#call?.cancel();
      await this.#call?.ended.catch(() => undefined);
    } else {
      await context.admin.resolveMigration(order.migration);
    }
  }

  async #settle(last: ProgressLine, failure: unknown): Promise<void> {
    const parts = this.#parts;
    if (last.phase === 'COMMITTED') {
      settleDeparted(parts);
      parts.onProgress(last);
    } else if (last.phase === 'ABORTED') {
      await settleStaying(parts, last.message);
      parts.onProgress(last);
    } else {
      const line = last.phase === 'IN_DOUBT' ? last : inDoubt(last, failure);
      parts.workers.beInDoubt(`it is not known yet whether it went: ${line.message}`);
      parts.onProgress(line);
    }
  }
}

type Settled = Pick<DepartureParts, 'context' | 'status' | 'workers'>;

/** It lives at the destination. */
export function settleDeparted({ status, workers }: Settled): void {
  const to = status.entry.migration?.peer ?? 'another host';
  workers.gone();
  const moved = { to, at: new Date().toISOString() };
  status.update({ moved, migration: null, runningInBoot: null, crashed: null });
  barrier('migrate.source.settled');
  status.rest();
  status.log.info({ to }, 'moved to another host');
}

/** It lives here. Resolves when it goes on, or will not, or takes long. @throws ToolstackError where the manager cannot be asked */
export async function settleStaying({ context, status, workers }: Settled, reason: string): Promise<void> {
  const { state, entry } = status;
  const isServed = state.kind !== 'migrating' || 'doors' in state;
  const wasRunning = entry.runningInBoot === bootId().toString('hex');
  const isFrozen = isServed || (wasRunning && (await context.admin.vtpm(entry.id))?.isSuspended === true);
  status.log.warn({ reason }, 'not moved');
  if (isFrozen) {
    await whenItGoesOn(status, workers.stay(`it was not moved: ${reason}`));
    return;
  }
  // As after any end of a supervisor: the VM may still run, and must not get a TPM with fresh PCRs.
  const crashed = wasRunning ? SUPERVISOR_ENDED : entry.crashed;
  workers.gone();
  status.update({ migration: null, runningInBoot: null, crashed });
  status.rest();
}

/** After the end of a supervisor, or of a doubt. @returns false where the manager does not know yet @throws ToolstackError */
export async function settleDeparture(parts: Settled): Promise<boolean> {
  const { context, status } = parts;
  const { migration } = status.entry;
  if (!migration) return true;
  const outcome = await outcomeOf(context.admin, status.entry, migration);
  if (outcome.verdict === 'pending') return false;
  if (outcome.verdict === 'COMMIT') settleDeparted(parts);
  else await settleStaying(parts, 'it was given up');
  return true;
}
