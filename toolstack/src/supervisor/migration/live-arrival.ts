import { barrier, bootId } from 'vtpm-common';
import type { Doors } from '../doors.js';
import type { VmRun } from '../vm-run.js';
import type { VtpmContext } from '../vtpm-state.js';
import type { VtpmStatus } from '../vtpm-status.js';
import type { ClaimedWorker } from '../worker-pool.js';
import type { WorkerProcess } from '../worker-process.js';
import { giveIdentity } from '../worker-start.js';
import type { WorkerSupply } from '../worker-supply.js';

/** A vTPM that comes, frozen, from another host. */
export interface Coming {
  /** Name of the host. */
  readonly from: string;
  /** That it has there. */
  readonly epoch: number;
  readonly vmRunId: string;
}

export interface LiveArrivalParts {
  readonly context: Pick<VtpmContext, 'office'>;
  readonly status: VtpmStatus;
  readonly supply: WorkerSupply;
  readonly claimed: ClaimedWorker;
  readonly run: VmRun;
  watch(worker: WorkerProcess): void;
  /** The Load is on its way. */
  onWaiting(): Promise<void>;
}

/** A migration has limits of its own; this ends a worker that nobody tells. */
const LIMIT_MS = 3_600_000;

/**
 * The worker's Load waits until the manager has the vTPM. Resolves when it serves and the doors are open; before that nobody
 * sees them. @throws ToolstackError; nothing of it is left then, but the entry, and the run: where the manager has the vTPM, a
 * worker goes on from what this one left
 */
export async function arriveLive(
  parts: LiveArrivalParts,
  { from, epoch: there, vmRunId }: Coming,
): Promise<void> {
  const { context, status, supply, claimed, run } = parts;
  const { worker } = claimed;
  const reason = `it comes from ${from}`;
  status.state = { kind: 'arriving', reason, worker };
  status.vmm = undefined;
  const entry = { ...status.entry, vmRunId };
  let making: Promise<Doors> | undefined;
  try {
    const { epoch, generation } = await giveIdentity(claimed, {
      ...{ ...supply.startParts(run), entry, limitMs: LIMIT_MS },
      issue: (key, digest) => context.office.expect(entry, key, digest, there),
      onIssued: (issued) => {
        // All that is written before the TPM stops is not written while its guest waits.
        status.update({ vmRunId, runningInBoot: bootId().toString('hex'), epoch: issued.epoch });
        making = supply.openDoors(run);
        making.catch(() => undefined);
        parts.onWaiting().catch(() => worker.kill());
      },
    });
    barrier('migrate.destination.serving');
    const doors = await (making ?? supply.openDoors(run));
    status.state = { kind: 'running', worker, doors };
    doors.show();
    barrier('migrate.destination.shown');
    parts.watch(worker);
    status.log.info({ epoch, generation, pid: worker.pid, from }, 'arrived, and running');
    // Until then the entry leaves it to the manager what it is.
    status.tryUpdate({ manufactured: true, epoch, moved: null, migration: null });
  } catch (error) {
    status.lingering = (await worker.kill()).lingering;
    await making?.then(
      (doors) => doors.close(),
      () => undefined,
    );
    status.state = { kind: 'arriving', reason, worker: undefined };
    throw error;
  }
}
