import { barrier, bootId } from 'vtpm-common';
import { ToolstackError } from '../../error.js';
import type { Incoming } from '../admin-client.js';
import type { VtpmContext } from '../vtpm-state.js';
import type { VtpmStatus } from '../vtpm-status.js';
import { whenItGoesOn } from './going-on.js';
import { outcomeOf, SUPERVISOR_ENDED } from './outcome.js';
import type { TravellingWorkers } from './travelling-workers.js';

export interface ArrivalParts {
  readonly context: Pick<VtpmContext, 'admin'>;
  readonly status: VtpmStatus;
  readonly workers: TravellingWorkers;
}

/** Its VMM has lost who was to give it its TPM here, or never had it. */
const NOBODY_WAITS = new ToolstackError(
  'migration-aborted',
  'the supervisor that was to serve its VMM has ended; migrate it again',
);

/** What an arrival came to. `pending`: the manager does not know yet. `nothing`: its entry is to go. */
export type Arrived = 'here' | 'pending' | 'nothing';

/**
 * Takes a vTPM in whose entry is there: live, a worker waits for its state; else nothing runs. Where it comes to nothing the
 * manager is told, and says in the end what it was.
 * @throws ToolstackError where the manager cannot be asked what came of it
 */
export async function takeIn(parts: ArrivalParts, incoming: Incoming): Promise<Arrived> {
  const { context, workers, status } = parts;
  const { migration, mode, epoch, vmRunId, from } = incoming;
  barrier('migrate.destination.entry');
  const accept = async (): Promise<void> => {
    barrier('migrate.destination.waiting');
    await context.admin.acceptMigration(migration);
  };
  try {
    if (mode === 'VMM') {
      await workers.arriveWithVmm({ from: from.name, epoch, vmRunId });
      await accept();
      return 'pending';
    }
    if (mode === 'OFFLINE') {
      await accept();
      return 'pending';
    }
    await workers.arrive({ from: from.name, epoch, vmRunId }, accept);
    return 'here';
  } catch (error) {
    const reason = ToolstackError.from(error, 'no worker is there for it');
    status.log.warn({ code: reason.code, reason: reason.message }, 'a vTPM does not arrive');
    await giveUp(context.admin, migration, reason);
    return await settleArrival(parts);
  }
}

/** Where the manager does not listen any more, it has decided. */
async function giveUp(
  admin: Pick<VtpmContext['admin'], 'refuseMigration'>,
  migration: string,
  reason: ToolstackError,
): Promise<void> {
  await admin.refuseMigration(migration, reason).catch(() => undefined);
}

/**
 * For the end of the supervisor. What its VMM is to bring comes nowhere without the doors of here, and the next supervisor cannot
 * have its connections: the source hears now that it keeps the vTPM.
 */
export async function breakOffArrival({ context, status, workers }: ArrivalParts): Promise<void> {
  const { migration } = status.entry;
  const { isAwaited } = workers;
  await workers.comesNot();
  if (isAwaited && migration) await giveUp(context.admin, migration.id, NOBODY_WAITS);
}

/** What came of it, by the manager's record. @throws ToolstackError */
export async function settleArrival({ context, status, workers }: ArrivalParts): Promise<Arrived> {
  const { migration } = status.entry;
  if (!migration) return 'here';
  const outcome = await outcomeOf(context.admin, status.entry, migration);
  if (outcome.verdict === 'pending') {
    // The supervisor that served its VMM was killed: the manager would wait for a day.
    const isServed = workers.isAwaited || status.state.kind !== 'arriving';
    if (outcome.awaitsVmm && !isServed) await giveUp(context.admin, migration.id, NOBODY_WAITS);
    return 'pending';
  }
  if (outcome.verdict === 'ABORT') {
    await workers.comesNot();
    if (migration.isNew) return 'nothing';
    status.update({ migration: null, runningInBoot: null });
    status.rest();
    return 'here';
  }
  // Its worker says so itself when it serves.
  if (workers.isAwaited) return 'pending';
  // It did while the manager was asked.
  if (status.entry.migration?.id !== migration.id) return 'here';
  const here = { manufactured: true, moved: null, crashed: null, epoch: outcome.record?.epoch ?? null };
  // A worker serves, and the list could not be written.
  if (status.state.kind === 'running' || status.state.kind === 'lost') {
    status.update({ ...here, runningInBoot: bootId().toString('hex'), migration: null });
    return 'here';
  }
  const runsHere = status.entry.runningInBoot === bootId().toString('hex');
  if (runsHere && (outcome.record?.isSuspended || workers.hasRun)) {
    // Its VM runs here: the TPM goes on from where it was frozen, or behind what the first worker did with it.
    status.update(here);
    await whenItGoesOn(status, workers.resume('it has arrived, and its worker has not come up'));
  } else {
    // A guest was served already, and what its TPM was after that has ended with the supervisor.
    const crashed = runsHere ? SUPERVISOR_ENDED : null;
    status.update({ ...here, crashed, migration: null, runningInBoot: null });
    status.rest();
  }
  status.log.info({ from: migration.peer }, 'arrived');
  return 'here';
}
