import { join } from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import type { Logger, Paths } from 'vtpm-common';
import { CheckpointStore } from './checkpoint-store.js';
import type { WorkerMessage } from './control-protocol.js';
import type { Entry } from './entry.js';
import { Lanes } from './lanes.js';
import { connectWorkerLink, connectWorkerLinkAgain } from './manager-link.js';
import { type PoolSettings, PoolSize } from './pool-size.js';
import type { WorkerLauncher } from './worker-launcher.js';
import type { WorkerOwner, WorkerProcess } from './worker-process.js';

export interface WorkerPoolOptions {
  readonly launcher: WorkerLauncher;
  readonly paths: Paths;
  readonly settings: PoolSettings;
  readonly log: Logger;
  /** Of the manager that tickets are for, hex; undefined where it cannot be asked. */
  managerKey(): Promise<string | undefined>;
}

/** A worker for one vTPM; it has no identity yet. */
export interface ClaimedWorker {
  readonly worker: WorkerProcess;
  /** With its key. @throws ToolstackError `worker-failed` | `worker-late` */
  readonly ready: Promise<Ready>;
  /** It was made for this vTPM, so nothing that happened to it before can be the cause of a failure. */
  readonly isFresh: boolean;
}

export interface PoolView {
  /** Workers that a start can have at once. */
  readonly idle: number;
  /** Workers that are coming up, or wait for a manager that is away. */
  readonly starting: number;
  /** How many there shall be now. */
  readonly target: number;
}

type Ready = Extract<WorkerMessage, { type: 'ready' }>;

interface Waiting {
  readonly worker: WorkerProcess;
  readonly ready: Promise<Ready>;
  isRehearsed: boolean;
}

/** A worker under load on a small machine takes seconds; one that takes longer hangs. */
const READY_LIMIT_MS = 30_000;
/** A VM boots first, and perhaps without the processor's help. */
const VM_READY_LIMIT_MS = 180_000;
/** Making a worker costs processor time: more side by side would only share it, until none is ready in time. */
const PARALLEL_LAUNCHES = 4;
/** Starts come in groups, and making a worker keeps the supervisor from its guests for some milliseconds: it waits. */
const QUIET_MS = 100;
/** Between two looks at what is too much by now. */
const TICK_MS = 2_000;
const FIRST_BACKOFF_MS = 250;
const LONGEST_BACKOFF_MS = 60_000;
/** A worker that was well for so long did not die of what the one before it died of. */
const WELL_MS = 10_000;

/**
 * Sandboxed workers that are started ahead: everything is loaded, rehearsed and connected, and only who they are is not
 * known. A start takes one, or where there is none a fresh one. As many are kept as were started within the last minute,
 * within the bounds of the settings and of the host's memory. They are made one after the other when nothing is being
 * started, so that a start has the processors for itself.
 */
export class WorkerPool {
  readonly #options: WorkerPoolOptions;
  readonly #lanes = new Lanes(PARALLEL_LAUNCHES);
  #closing = new AbortController();
  readonly #size: PoolSize;
  readonly #waiting = new Set<Waiting>();
  #tick: NodeJS.Timeout | undefined;
  #underWay = 0;
  #quietAt = 0;
  #failures = 0;
  /** None is made before; as performance.now() says it. */
  #notBefore = 0;
  #isFilling = false;
  #filled: Promise<void> = Promise.resolve();

  constructor(options: WorkerPoolOptions) {
    this.#options = options;
    this.#size = new PoolSize(options.settings);
    this.open();
  }

  /** From now on it is kept filled; also after a `close`. */
  open(): void {
    this.#closing = new AbortController();
    clearInterval(this.#tick);
    this.#tick = setInterval(() => this.#adjust(), TICK_MS).unref();
    this.#adjust();
  }

  view(): PoolView {
    const idle = [...this.#waiting].filter(isIdle).length;
    return { idle, starting: this.#waiting.size - idle, target: this.#size.target(this.#waiting.size) };
  }

  /** Runs a start; the pool is filled up after it. */
  async duringStart<T>(run: () => Promise<T>): Promise<T> {
    this.#underWay++;
    this.#size.noteStart();
    try {
      return await run();
    } finally {
      this.#underWay--;
      this.#quietAt = performance.now() + QUIET_MS;
      setTimeout(() => this.#adjust(), QUIET_MS);
    }
  }

  /** A worker that waits, or a fresh one. @throws as `fresh` */
  async take(
    isolation: Entry['isolation'],
    owner: WorkerOwner,
    broken?: AbortSignal,
  ): Promise<ClaimedWorker> {
    const found = isolation === 'sandbox' ? this.#nextWaiting() : undefined;
    if (!found) return await this.fresh(isolation, owner, broken);
    this.#waiting.delete(found);
    found.worker.giveTo(owner);
    return { worker: found.worker, ready: found.ready, isFresh: false };
  }

  /**
   * One that is made now, or where too many are coming up when it is its turn. A VM waits for nobody, and nobody for it.
   * @param broken given up while it waits
   * @throws ToolstackError `manager-unreachable` | `missing-package` | `busy` | `internal`
   */
  async fresh(
    isolation: Entry['isolation'],
    owner: WorkerOwner,
    broken?: AbortSignal,
  ): Promise<ClaimedWorker> {
    if (isolation === 'vm') return await this.#launch(isolation, owner, VM_READY_LIMIT_MS);
    const { signal } = this.#closing;
    const leave = await this.#lanes.enter(broken ? AbortSignal.any([signal, broken]) : signal);
    try {
      const claimed = await this.#launch(isolation, owner, READY_LIMIT_MS);
      claimed.ready.then(leave, leave);
      return claimed;
    } catch (error) {
      leave();
      throw error;
    }
  }

  /** After a change of the image: what waits is of the one before. */
  renew(): void {
    this.#adjust();
  }

  /** Resolves when no worker of the pool is left. */
  async close(): Promise<void> {
    this.#closing.abort();
    clearInterval(this.#tick);
    await this.#endWorkers([...this.#waiting]);
    await this.#filled;
    await this.#endWorkers([...this.#waiting]);
  }

  async #launch(
    isolation: Entry['isolation'],
    owner: WorkerOwner,
    readyLimitMs: number,
  ): Promise<ClaimedWorker> {
    const { launcher, paths } = this.#options;
    const link = await connectWorkerLink(paths.manager.workerSocket);
    const worker = launcher.launch(isolation, link, owner);
    return { worker, ready: readiness(worker, readyLimitMs), isFresh: true };
  }

  /** One that is coming up is sooner there than one that is still to be made. */
  #nextWaiting(): Waiting | undefined {
    const alive = [...this.#waiting].filter(
      ({ worker }) => worker.isLinked && !worker.hasEnded && this.#isCurrent(worker),
    );
    return alive.find(isIdle) ?? alive[0];
  }

  /** One that was being made while the image changed is not. */
  #isCurrent(worker: WorkerProcess): boolean {
    return worker.image === this.#options.launcher.image;
  }

  #adjust(): void {
    if (this.#closing.signal.aborted) return;
    void this.#endWorkers([...this.#waiting].filter(({ worker }) => !this.#isCurrent(worker)));
    const surplus = this.#waiting.size - this.#size.target(this.#waiting.size);
    if (surplus > 0) void this.#endWorkers([...this.#waiting].slice(0, surplus));
    if (this.#isWanting() && !this.#isFilling) this.#filled = this.#fill();
  }

  #isWanting(): boolean {
    const { size } = this.#waiting;
    if (this.#closing.signal.aborted || size >= this.#size.target(size)) return false;
    // With none left the next start is served sooner by the one that is made now.
    return size === 0 || (this.#underWay === 0 && performance.now() >= this.#quietAt);
  }

  async #fill(): Promise<void> {
    const { signal } = this.#closing;
    this.#isFilling = true;
    try {
      while (this.#isWanting()) {
        const pause = this.#notBefore - performance.now();
        if (pause > 0) await delay(pause, undefined, { signal }).catch(() => undefined);
        else await this.#add();
      }
    } catch (error) {
      this.#failed((error as Error).message);
    } finally {
      this.#isFilling = false;
    }
  }

  /** Resolves when the worker waits for an identity, or has got one. */
  async #add(): Promise<void> {
    const { launcher, paths, log } = this.#options;
    const isOpen = (): boolean => !this.#closing.signal.aborted;
    const link = await connectWorkerLinkAgain(paths.manager.workerSocket, isOpen);
    if (!link) return;
    const managerKey = await this.#options.managerKey();
    const worker = launcher.launch('sandbox', link, {
      logPath: join(paths.log, 'pool.log'),
      log,
      onMessage: () => undefined,
    });
    const waiting: Waiting = { worker, ready: readiness(worker), isRehearsed: false };
    this.#waiting.add(waiting);
    const watched = this.#watch(waiting);
    try {
      await waiting.ready;
      const rehearsed = worker.waitFor('rehearsed', READY_LIMIT_MS);
      passRehearsal(worker, managerKey);
      await rehearsed;
      waiting.isRehearsed = true;
    } catch {
      // Whoever has it by now sees for himself what became of it.
      if (!this.#waiting.has(waiting)) return;
      await worker.kill();
      await watched;
    }
  }

  async #watch(waiting: Waiting): Promise<void> {
    const { reason } = await waiting.worker.ended;
    if (!this.#waiting.delete(waiting)) return;
    if (Date.now() - waiting.worker.startedAt.getTime() > WELL_MS) this.#failures = 0;
    this.#failed(reason);
    this.#adjust();
  }

  /** Whatever was the cause, the next one may have it too. */
  #failed(reason: string): void {
    if (this.#closing.signal.aborted) return;
    const pause = Math.min(LONGEST_BACKOFF_MS, FIRST_BACKOFF_MS * 2 ** this.#failures);
    this.#failures++;
    this.#notBefore = performance.now() + pause;
    this.#options.log.warn({ reason, nextInMs: pause }, 'a worker of the pool was lost');
  }

  async #endWorkers(surplus: readonly Waiting[]): Promise<void> {
    for (const waiting of surplus) this.#waiting.delete(waiting);
    await Promise.all(surplus.map(({ worker }) => worker.kill()));
  }
}

/** The checkpoint is of no VM run: the worker alone has it then. */
function passRehearsal(worker: WorkerProcess, managerKey: string | undefined): void {
  const none = CheckpointStore.create({ control: false });
  try {
    const checkpoint = { keeps: true, control: false, resumes: null };
    worker.passAll(none.descriptors, { type: 'rehearse', managerKey, checkpoint });
  } finally {
    none.close();
  }
}

function isIdle({ worker, isRehearsed }: Waiting): boolean {
  return isRehearsed && worker.isLinked && !worker.hasEnded;
}

function readiness(worker: WorkerProcess, limitMs = READY_LIMIT_MS): Promise<Ready> {
  const ready = worker.waitFor('ready', limitMs).catch((error: unknown) => {
    // One that reads what is not its code ends by itself: the cause is not the worker.
    worker.checkFiles();
    throw error;
  });
  // Who waits for it hears of the failure; it may be that nobody does any more.
  ready.catch(() => undefined);
  return ready;
}
