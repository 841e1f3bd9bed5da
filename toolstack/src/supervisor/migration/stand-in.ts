import { setTimeout as delay } from 'node:timers/promises';
import { type Logger, socketFd } from 'vtpm-common';
import { ToolstackError } from '../../error.js';
import type { DoorName, VmmCall } from '../control-protocol.js';
import type { Doors, Visit } from '../doors.js';
import type { VmRun } from '../vm-run.js';
import type { ClaimedWorker } from '../worker-pool.js';
import type { WorkerProcess } from '../worker-process.js';
import { giveStandIn, isOfTheDead } from '../worker-start.js';

export interface StandInParts {
  /** `away`: the TPM goes to another host with its VM. `incoming`: it comes. */
  readonly kind: 'away' | 'incoming';
  readonly run: VmRun;
  readonly doors: Doors;
  /** That the VMM has chosen; 0 where it has not. */
  readonly bufferSize: number;
  readonly log: Logger;
  /** A worker that waits for an identity. @throws ToolstackError */
  claim(broken: AbortSignal): Promise<ClaimedWorker>;
  /** The VMM needs the TPM. Not called again before it resolves. */
  called(call: VmmCall): Promise<void>;
}

const RETRY_MS = 1_000;

/** Who came through another door waits for the TPM. */
export function isVmmDoor(door: DoorName): boolean {
  return door === 'control' || door === 'vmm-data';
}

/**
 * While the TPM of a VMM is on its way, a worker without one has the VMM's connections. Where it ends another takes its place:
 * what the VMM asked for is in its socket.
 */
export class StandIn {
  readonly #parts: StandInParts;
  readonly #over = new AbortController();
  #claimed: ClaimedWorker | undefined;
  /** Is about to be more than that. */
  #taken: WorkerProcess | undefined;
  /** Waits until it is needed. */
  #prepared: Promise<ClaimedWorker> | undefined;
  #isCalling = false;
  #settled: Promise<void> = Promise.resolve();

  constructor(parts: StandInParts) {
    this.#parts = parts;
  }

  /** Undefined while there is none. */
  get worker(): WorkerProcess | undefined {
    return this.#claimed?.worker;
  }

  /** As `worker`, also where it has an identity and does not serve yet. */
  get process(): WorkerProcess | undefined {
    return this.worker ?? this.#taken;
  }

  /** There is a worker when `begin` comes, if one can be had by then. */
  prepare(): void {
    this.#prepared ??= this.#parts.claim(this.#over.signal);
    this.#prepared.catch(() => undefined);
  }

  /** As `begin`, as often as it takes. */
  start(refused?: string): void {
    this.#settled = this.#replace(refused);
  }

  /**
   * Resolves when the VMM is served.
   * @param refused why the INIT that is in its socket is not done @throws ToolstackError
   */
  async begin(refused?: string): Promise<void> {
    const { run, doors, kind, bufferSize, log } = this.#parts;
    const claimed = await this.#claim();
    const { worker } = claimed;
    try {
      const visits = doors.visits().filter(({ door }) => isVmmDoor(door));
      await giveStandIn(claimed, run, visits, { kind, bufferSize, refused });
      if (this.#over.signal.aborted) throw new ToolstackError('busy', 'nobody has to stand in any more');
      this.#claimed = claimed;
      const known = new Set(visits.map(({ id }) => id));
      for (const visit of doors.visits()) if (!known.has(visit.id)) this.pass(visit);
    } catch (error) {
      await worker.kill();
      throw error;
    }
    log.info({ pid: worker.pid, kind }, 'a worker stands in for the TPM');
    void worker.ended.then((end) => this.#ended(worker, end.reason));
  }

  /** A connection that came; one that it does not serve waits. */
  pass({ door, id, peer, socket }: Visit): void {
    if (!isVmmDoor(door)) return;
    try {
      this.worker?.pass(socketFd(socket), { type: 'connection', door, id, peer });
    } catch (error) {
      // The next worker gets all that are open.
      if (!isOfTheDead(error)) throw error;
    }
  }

  /** The worker said so, and says it again. */
  heard(call: VmmCall): void {
    if (this.#isCalling || this.#over.signal.aborted) return;
    this.#isCalling = true;
    this.#parts
      .called(call)
      .catch((error: unknown) => {
        this.#parts.log.warn({ reason: (error as Error).message }, 'the VMM waits for its TPM');
      })
      .finally(() => {
        this.#isCalling = false;
      });
  }

  /** What the VMM waits for is not done. */
  refuse(message: string): void {
    this.worker?.send({ type: 'no-tpm', message });
  }

  /** From now on the process is the caller's, who gives it an identity or kills it. @throws ToolstackError `busy` while there is none */
  take(): ClaimedWorker {
    const claimed = this.#claimed;
    if (!claimed) throw new ToolstackError('busy', 'the worker that stands in has ended; another one comes');
    this.#claimed = undefined;
    this.#taken = claimed.worker;
    return claimed;
  }

  /** Resolves when nothing of it can run any more. */
  async end(): Promise<void> {
    this.#over.abort();
    const { worker } = this;
    this.#claimed = undefined;
    await worker?.kill();
    await (await this.#prepared?.catch(() => undefined))?.worker.kill();
    await this.#settled;
  }

  async #claim(): Promise<ClaimedWorker> {
    const prepared = await this.#prepared?.catch(() => undefined);
    this.#prepared = undefined;
    return prepared && !prepared.worker.hasEnded ? prepared : await this.#parts.claim(this.#over.signal);
  }

  #ended(worker: WorkerProcess, reason: string): void {
    if (this.worker !== worker) return;
    this.#claimed = undefined;
    this.#parts.log.warn({ reason }, 'the worker that stood in ended; another one takes its place');
    this.start();
  }

  async #replace(refused: string | undefined): Promise<void> {
    const { signal } = this.#over;
    while (!signal.aborted) {
      try {
        await this.begin(refused);
        return;
      } catch (error) {
        if (signal.aborted) return;
        this.#parts.log.warn({ reason: (error as Error).message }, 'nobody stands in for the TPM yet');
      }
      await delay(RETRY_MS, undefined, { signal }).catch(() => undefined);
    }
  }
}
