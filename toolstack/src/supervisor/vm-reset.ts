import { randomUUID } from 'node:crypto';
import { ToolstackError } from '../error.js';
import type { VmmChoice } from './control-protocol.js';
import { passVisit } from './door-events.js';
import type { Doors } from './doors.js';
import { killAndWait } from './processes.js';
import type { VmRun } from './vm-run.js';
import type { VtpmState } from './vtpm-state.js';
import type { VtpmStatus } from './vtpm-status.js';
import type { ClaimedWorker } from './worker-pool.js';
import type { WorkerProcess } from './worker-process.js';
import { giveIdentity } from './worker-start.js';
import type { WorkerSupply } from './worker-supply.js';

/** What a reset needs of the workers of a vTPM. */
export interface ResetParts {
  readonly status: VtpmStatus;
  readonly run: VmRun;
  readonly supply: WorkerSupply;
  /** A worker that waits for an identity. @throws ToolstackError, also where the run is over */
  claim(): Promise<ClaimedWorker>;
  watch(worker: WorkerProcess): void;
  goOn(run: VmRun, doors: Doors, reason: string): Promise<void>;
}

/**
 * The VMM of a TPM that is lost begins a new run of its VM: another worker takes the lost one's place, with its connections. The
 * lost one stays where there is no other: no VM powers on while the manager is away. Never rejects.
 */
export async function resetLost(
  parts: ResetParts,
  lost: VtpmState & { kind: 'lost' },
  vmm: VmmChoice,
): Promise<void> {
  const { status, run } = parts;
  const { doors, worker: before } = lost;
  if (status.state !== lost) return;
  let claimed: ClaimedWorker;
  try {
    claimed = await parts.claim();
  } catch (error) {
    status.log.warn({ reason: (error as Error).message }, 'the VM cannot be reset yet');
    before.send({ type: 'no-vm-reset' });
    return;
  }
  const { worker } = claimed;
  if (run.isOver || status.state !== lost) {
    await worker.kill();
    return;
  }
  const state: VtpmState = { kind: 'restarting', reason: 'its VM is reset', doors, worker };
  status.state = state;
  let next = run;
  try {
    status.lingering = (await before.kill()).lingering;
    await killAndWait(status.lingering);
    status.lingering = [];
    if (run.isOver) throw new ToolstackError('busy', 'the vTPM is being stopped');
    next = parts.supply.nextRun();
    run.end();
    const vmRunId = randomUUID();
    const { epoch, generation } = await giveIdentity(claimed, {
      ...parts.supply.startParts(next),
      entry: { ...status.entry, vmRunId },
      vmm,
      onIssued: (issued) => status.update({ vmRunId, epoch: issued.epoch }),
    });
    if (next.isOver) throw new ToolstackError('busy', 'the vTPM is being stopped');
    status.state = { kind: 'running', worker, doors };
    for (const visit of doors.visits()) passVisit(status, next, visit);
    parts.watch(worker);
    status.log.info({ epoch, generation, pid: worker.pid }, 'running again: the VM was reset');
  } catch (error) {
    state.worker = undefined;
    status.lingering = (await worker.kill()).lingering;
    if (next.isOver) return;
    const { message } = ToolstackError.from(error, 'the VM cannot be reset');
    // Another lost worker hears the VMM ask again.
    next.lost = `${lost.reason}; ${message}`;
    await parts.goOn(next, doors, message);
  }
}
