import { constants } from 'node:os';
import { setTimeout as delay } from 'node:timers/promises';
import { type Settings, SystemCallError, socketFd } from 'vtpm-common';
import { ToolstackError } from '../error.js';
import type { CheckpointFields, VmmChoice } from './control-protocol.js';
import { powerOf } from './door-kinds.js';
import type { Visit } from './doors.js';
import type { Entry } from './entry.js';
import { type IssuedTicket, type TicketOffice, ticketText } from './ticket-office.js';
import type { VmRun } from './vm-run.js';
import type { ClaimedWorker } from './worker-pool.js';
import type { WorkerProcess } from './worker-process.js';

/** A worker under load on a small machine takes seconds; one that takes longer hangs. */
const SERVING_LIMIT_MS = 60_000;
/** The kernel holds some 200 descriptors for a worker; it takes them as soon as it runs. */
const CHANNEL_LIMIT_MS = 10_000;
const CHANNEL_POLL_MS = 10;

const NOTHING_CHOSEN: VmmChoice = { bufferSize: 0, locality: 0 };

export interface StartParts {
  readonly office: TicketOffice;
  readonly settings: Settings;
  readonly run: VmRun;
  readonly entry: Entry;
  /** The ticket may be signed without asking the manager. */
  readonly presumes?: boolean;
  /** What the VMM chose in the run before this one, where that was lost. */
  readonly vmm?: VmmChoice;
  /** Its VMM has brought it from another host. */
  readonly arrives?: boolean;
  /** In the place of the ticket for a vTPM that the manager has. */
  issue?(workerKey: Uint8Array, imageDigest: string): Promise<IssuedTicket>;
  /** Milliseconds that the worker has until it serves. */
  readonly limitMs?: number;
  /** Hears of the ticket when the worker has it. */
  onIssued?(issued: IssuedTicket): void;
}

export interface Serving {
  readonly epoch: number;
  readonly generation: number;
}

/**
 * Gives a new worker the identity of a vTPM that is powered on, or of one that goes on.
 * @param visits connections that the worker before this one had; absent at a power-on
 * @throws ToolstackError; the caller kills the worker
 */
export async function giveIdentity(
  { worker, ready }: ClaimedWorker,
  parts: StartParts,
  visits?: readonly Visit[],
): Promise<Serving> {
  const { office, settings, run, entry, presumes, vmm = NOTHING_CHOSEN, arrives, onIssued } = parts;
  const key = Buffer.from((await ready).publicKey, 'hex');
  worker.checkImage();
  const { digest } = worker.image;
  const issued =
    (presumes && office.presume(entry, key, digest)) ||
    (await (parts.issue?.(key, digest) ?? office.issue(entry, key, digest, visits ? 'goes-on' : 'is-on')));
  const hold = settings['outage-hold'];
  const isServing = worker.waitFor('serving', parts.limitMs ?? SERVING_LIMIT_MS);
  const serving = await afterPassing(isServing, async () => {
    // A VM of a worker's own takes no descriptors.
    const outlives = entry.isolation !== 'vm';
    worker.passAll(outlives ? run.checkpoint.descriptors : [], {
      type: 'identity',
      ticket: ticketText(issued.ticket),
      managerKey: issued.managerKey,
      startup: entry.startup,
      power: powerOf(entry.doors),
      vmm,
      ...(arrives && { arrives }),
      outage: { holdMs: { tpm: hold, tcti: hold } },
      checkpoint: outlives ? checkpointFields(run, settings.checkpoint, visits) : null,
    });
    if (visits) await passVisits(worker, visits);
    onIssued?.(issued);
  });
  if (serving.generation < 1) {
    throw new ToolstackError('worker-failed', 'the worker wants to serve a TPM that is not saved yet');
  }
  if (visits) for (const peer of run.clientsGone) worker.send({ type: 'peer-gone', peer });
  return serving;
}

/** A worker without identity, which answers TPM_RC_FAILURE to everything. @throws ToolstackError; the caller kills it */
export async function giveLoss(
  { worker, ready }: ClaimedWorker,
  run: VmRun,
  visits: readonly Visit[],
): Promise<void> {
  await ready;
  const isLost = worker.waitFor('lost', SERVING_LIMIT_MS);
  await afterPassing(isLost, async () => {
    worker.passAll(run.checkpoint.descriptors, {
      type: 'lost',
      checkpoint: checkpointFields(run, 'off', visits),
    });
    await passVisits(worker, visits);
  });
}

/**
 * A worker without identity, which has the VMM's connections until the TPM comes.
 * @param visits those of the VMM @throws ToolstackError; the caller kills it
 */
export async function giveStandIn(
  { worker, ready }: ClaimedWorker,
  run: VmRun,
  visits: readonly Visit[],
  {
    kind,
    bufferSize,
    refused,
  }: { kind: 'away' | 'incoming'; bufferSize: number; refused: string | undefined },
): Promise<void> {
  await ready;
  const isStandingIn = worker.waitFor('standing-in', SERVING_LIMIT_MS);
  await afterPassing(isStandingIn, async () => {
    worker.passAll(run.checkpoint.descriptors, {
      type: 'stand-in',
      ...{ kind, bufferSize },
      ...(refused !== undefined && { refused }),
      checkpoint: checkpointFields(run, 'off', visits),
    });
    await passVisits(worker, visits);
  });
}

/** What the worker says to what it is passed. Where it ended meanwhile its end says more than the failure to pass. */
async function afterPassing<T>(said: Promise<T>, pass: () => Promise<void>): Promise<T> {
  said.catch(() => undefined);
  try {
    await pass();
  } catch (error) {
    if (!isOfTheDead(error)) throw error;
  }
  return await said;
}

/** Whether a descriptor could not be passed because the worker is dying. */
export function isOfTheDead(error: unknown): boolean {
  if (error instanceof ToolstackError) return error.code === 'worker-failed';
  return error instanceof SystemCallError && DEAD.includes(error.errno);
}

const DEAD: readonly number[] = [constants.errno.EPIPE, constants.errno.ECONNRESET, constants.errno.EBADF];

function checkpointFields(
  run: VmRun,
  setting: Settings['checkpoint'],
  visits: readonly Visit[] | undefined,
): CheckpointFields {
  return {
    keeps: setting === 'always',
    control: run.checkpoint.hasControl,
    resumes: visits ? { newest: run.checkpoint.newest(), connections: visits.length } : null,
  };
}

/** Waits where the descriptor channel is full. @throws as `WorkerProcess.pass` */
export async function passVisits(
  worker: Pick<WorkerProcess, 'pass'>,
  visits: readonly Visit[],
): Promise<void> {
  const until = performance.now() + CHANNEL_LIMIT_MS;
  for (const { door, id, peer, socket } of visits) {
    for (;;) {
      try {
        worker.pass(socketFd(socket), { type: 'connection', door, id, peer });
        break;
      } catch (error) {
        if (!isFull(error) || performance.now() >= until) throw error;
        await delay(CHANNEL_POLL_MS);
      }
    }
  }
}

function isFull(error: unknown): boolean {
  return error instanceof SystemCallError && error.errno === constants.errno.EAGAIN;
}
