import { randomUUID } from 'node:crypto';
import { bootId } from 'vtpm-common';
import type { Doors } from './doors.js';
import { isOutdated, presumedWrong, wasLost } from './restart-policy.js';
import type { VmRun } from './vm-run.js';
import type { VtpmStatus } from './vtpm-status.js';
import type { ClaimedWorker } from './worker-pool.js';
import type { WorkerProcess } from './worker-process.js';
import { giveIdentity } from './worker-start.js';
import type { WorkerSupply } from './worker-supply.js';

export interface PowerOnParts {
  readonly status: VtpmStatus;
  readonly supply: WorkerSupply;
  /** No other worker takes the place of one that is lost. */
  isClosed(): boolean;
  /** The worker serves: its end is looked after. */
  watch(worker: WorkerProcess): void;
}

/** A new VM run, and its first worker. Resolves when the doors are open. @throws ToolstackError */
export async function powerOn(parts: PowerOnParts): Promise<void> {
  // Before anything is changed: no VM powers on while the manager is away.
  const claimed = await parts.supply.claim();
  await startWorker(parts, claimed, parts.supply.nextRun(), randomUUID());
}

/** @param presumes that the vTPM is at the manager as the list has it */
async function startWorker(
  parts: PowerOnParts,
  claimed: ClaimedWorker,
  run: VmRun,
  vmRunId: string,
  presumes = true,
): Promise<void> {
  const { status, supply } = parts;
  const { worker, isFresh } = claimed;
  const { vmRunId: lastRunId, runningInBoot, crashed, epoch: lastEpoch } = status.entry;
  status.state = { kind: 'starting', worker };
  status.vmm = undefined;
  let making: Promise<Doors> | undefined;
  try {
    const { epoch, generation } = await giveIdentity(claimed, {
      ...supply.startParts(run),
      entry: { ...status.entry, vmRunId },
      presumes,
      // Before a guest can get in, and while the worker and the manager are busy with the Load.
      onIssued: (issued) => {
        const { epoch } = issued;
        status.update({ vmRunId, runningInBoot: bootId().toString('hex'), crashed: null, epoch });
        making = supply.openDoors(run);
        making.catch(() => undefined);
      },
    });
    if (!status.entry.manufactured || status.entry.epoch !== epoch) {
      status.update({ manufactured: true, epoch });
    }
    const doors = await (making ?? supply.openDoors(run));
    status.state = { kind: 'running', worker, doors };
    doors.show();
    parts.watch(worker);
    status.log.info({ epoch, generation, pid: worker.pid }, 'running');
  } catch (error) {
    const hasEnded = worker.hasEnded;
    const end = await worker.kill();
    status.lingering = end.lingering;
    await making?.then(
      (doors) => doors.close(),
      () => undefined,
    );
    const isPresumedWrong = presumes && presumedWrong(end);
    const isWorkersFault = !isFresh && (hasEnded ? wasLost(end) : isOutdated(error));
    if (parts.isClosed() || !(isPresumedWrong || isWorkersFault)) throw error;
    const { reason } = end;
    let other: ClaimedWorker;
    if (isPresumedWrong) {
      status.update({ vmRunId: lastRunId, runningInBoot, crashed, epoch: lastEpoch });
      status.log.info({ reason }, 'the manager is asked, and another worker gets what it says');
      other = await supply.claim();
    } else {
      status.log.warn({ reason }, 'the worker from the pool was lost; a fresh one takes its place');
      other = await supply.claimFresh();
    }
    // What the lost one may have left is of a key that the next Load replaces, and its numbers would be taken for newer.
    run.end();
    await startWorker(parts, other, supply.nextRun(), vmRunId, false);
  }
}
