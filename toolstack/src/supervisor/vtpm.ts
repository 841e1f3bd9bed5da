import { randomUUID } from 'node:crypto';
import { join } from 'node:path';
import { bootId, type Logger, type Paths, type Settings, socketFd } from 'vtpm-common';
import { ToolstackError } from '../error.js';
import { type VmLayer, vmLayers } from '../vm/layers.js';
import type { Confinements } from './confinement.js';
import type { WorkerMessage } from './control-protocol.js';
import { accessOf } from './door-access.js';
import { type DoorPaths, Doors, doorPaths } from './doors.js';
import type { Entry } from './entry.js';
import { confinementOf, type Layer, type Profile } from './layers.js';
import { killAndWait, type ProcessId } from './processes.js';
import { type TicketOffice, ticketText } from './ticket-office.js';
import type { VtpmList } from './vtpm-list.js';
import type { ClaimedWorker, WorkerPool } from './worker-pool.js';
import type { WorkerEnd, WorkerOwner, WorkerProcess } from './worker-process.js';

/** What every vTPM of a supervisor shares. */
export interface VtpmContext {
  readonly list: VtpmList;
  readonly pool: WorkerPool;
  readonly confinements: Confinements;
  readonly office: TicketOffice;
  readonly paths: Paths;
  readonly settings: Settings;
  readonly log: Logger;
}

/**
 * `stopped`: no process. `starting`: a worker is there, the doors are not. `running`: a guest is served.
 * `stopping`: asked to save and end. `crashed`: the worker ended unasked; its PCRs are lost, and only a new VM run may
 * follow (an explicit start).
 */
export type VtpmState =
  | { readonly kind: 'stopped'; readonly reason: string | null }
  | { readonly kind: 'starting'; readonly worker: WorkerProcess | undefined }
  | { readonly kind: 'running'; readonly worker: WorkerProcess; readonly doors: Doors }
  | { readonly kind: 'stopping'; readonly worker: WorkerProcess; readonly doors: Doors }
  | { readonly kind: 'crashed'; readonly reason: string };

/** S of the supervisor's API. */
export interface VtpmView {
  readonly id: string;
  readonly name: string;
  readonly vmUuid: string;
  readonly isolation: string;
  readonly autostart: boolean;
  readonly startup: string;
  readonly socketOwner: string | null;
  readonly socketMode: string;
  readonly state: VtpmState['kind'];
  /** Why it crashed, or why the last start or stop did not go as asked. */
  readonly reason: string | null;
  readonly vmRunId: string | null;
  /** The newest epoch that a worker serves, served or is about to. */
  readonly epoch: number | null;
  readonly worker: {
    readonly pid: number;
    readonly isolation: string;
    readonly profile: Profile;
    /** In force, by /proc. */
    readonly layers: readonly (Layer | VmLayer)[];
    /** What the sandbox should have and was told not to insist on. */
    readonly waived: readonly Layer[];
    readonly startedAt: string;
  } | null;
  readonly sockets: DoorPaths & { readonly control: null; readonly ring: null };
}

/** A worker under load on a small machine takes seconds; one that takes longer hangs. */
const SERVING_LIMIT_MS = 60_000;

/** One vTPM: its entry in the list, and its worker while it has one. */
export class Vtpm {
  readonly #context: VtpmContext;
  readonly #log: Logger;
  #entry: Entry;
  #state: VtpmState;
  /** What a kill could not end. No start while it is there. */
  #lingering: readonly ProcessId[] = [];
  #operation: { readonly name: string; readonly settled: Promise<void> } | undefined;
  #isRemoved = false;
  #isShuttingDown = false;

  constructor(context: VtpmContext, entry: Entry) {
    this.#context = context;
    this.#log = context.log.child({ vtpm: entry.name });
    this.#entry = entry;
    this.#state =
      entry.crashed === null ? { kind: 'stopped', reason: null } : { kind: 'crashed', reason: entry.crashed };
  }

  get entry(): Entry {
    return this.#entry;
  }

  get state(): VtpmState['kind'] {
    return this.#state.kind;
  }

  view(): VtpmView {
    const { id, name, vmUuid, isolation, autostart, startup, vmRunId, epoch } = this.#entry;
    const { socketOwner, socketMode } = this.#entry;
    const state = this.#state;
    const worker = state.kind === 'stopped' || state.kind === 'crashed' ? undefined : state.worker;
    return {
      ...{ id, name, vmUuid, isolation, autostart, startup, socketOwner, socketMode },
      state: state.kind,
      reason: state.kind === 'stopped' || state.kind === 'crashed' ? state.reason : null,
      ...{ vmRunId, epoch },
      worker:
        worker?.pid === undefined
          ? null
          : {
              pid: worker.pid,
              isolation,
              ...this.#confinementOf(worker.pid),
              startedAt: worker.startedAt.toISOString(),
            },
      sockets: { ...doorPaths(this.#directory()), control: null, ring: null },
    };
  }

  /**
   * A power-on: a new VM run, a new worker. Resolves when the doors are open.
   * @throws ToolstackError `busy` | `already-running` | `worker-failed` | `image-not-allowed` | `image-changed` | `manager-unreachable` | …
   */
  start(): Promise<void> {
    // The pool makes nothing while a start takes from it; a VM takes nothing, and long.
    return this.#exclusively('started', () =>
      this.#entry.isolation === 'vm' ? this.#start() : this.#context.pool.duringStart(() => this.#start()),
    );
  }

  /** Resolves when the worker has saved and ended, or was killed for taking too long; `reason` says so then. */
  stop(): Promise<void> {
    return this.#exclusively('stopped', async () => {
      const state = this.#state;
      if (state.kind === 'running') {
        const { worker, doors } = state;
        this.#state = { kind: 'stopping', worker, doors };
        doors.closeEntrances();
        const limit = this.#context.settings['worker-stop-timeout'];
        const end = await worker.stop(limit);
        doors.close();
        this.#lingering = end.lingering;
        const reason = end.clean ? null : `it did not stop cleanly (${end.reason})`;
        if (reason) this.#log.warn({ reason }, 'stopped by force');
        else this.#log.info('stopped');
        this.#state = { kind: 'stopped', reason };
      } else {
        this.#state = { kind: 'stopped', reason: null };
      }
      if (this.#entry.crashed !== null || this.#entry.runningInBoot !== null) {
        this.#update({ crashed: null, runningInBoot: null });
      }
    });
  }

  /** Runs `forget` while nothing else can happen to the vTPM. @throws ToolstackError `not-stopped` | `busy` */
  remove(forget: () => void): Promise<void> {
    return this.#exclusively('removed', async () => {
      if (this.#state.kind !== 'stopped' && this.#state.kind !== 'crashed') {
        throw new ToolstackError(
          'not-stopped',
          `vTPM ${this.#entry.name} is ${this.#state.kind}; stop it first`,
        );
      }
      forget();
      this.#isRemoved = true;
    });
  }

  /** For the end of the supervisor: a start under way is broken off, a worker that serves is stopped. */
  async shutDown(): Promise<void> {
    this.#isShuttingDown = true;
    if (this.#state.kind === 'starting') await this.#state.worker?.kill();
    await this.#operation?.settled;
    if (this.#state.kind === 'running') await this.stop();
  }

  async #start(): Promise<void> {
    if (this.#state.kind === 'running') {
      throw new ToolstackError('already-running', `vTPM ${this.#entry.name} is running already`);
    }
    const before = this.#state;
    const { epoch } = this.#entry;
    this.#state = { kind: 'starting', worker: undefined };
    try {
      await killAndWait(this.#lingering);
      this.#lingering = [];
      const { pool } = this.#context;
      const { isolation } = this.#entry;
      // Before anything is changed: no VM powers on while the manager is away.
      const claimed = await pool.take(isolation, this.#owner());
      await this.#startWorker(claimed, randomUUID());
    } catch (error) {
      const failure = ToolstackError.from(error, `vTPM ${this.#entry.name} cannot be started`);
      this.#log.warn({ code: failure.code, reason: failure.message }, 'not started');
      if (this.#entry.crashed === null) {
        this.#state = { kind: 'stopped', reason: `the last start failed: ${failure.message}` };
        if (this.#entry.runningInBoot !== null) this.#tryUpdate({ runningInBoot: null, epoch });
      } else {
        this.#state = before;
      }
      throw failure;
    }
  }

  #confinementOf(pid: number): Pick<NonNullable<VtpmView['worker']>, 'profile' | 'layers' | 'waived'> {
    const { profile, waived } = this.#context.confinements;
    const isSandbox = this.#entry.isolation !== 'none';
    const layers = vmLayers(pid, confinementOf(pid, waived));
    return { profile, layers, waived: isSandbox ? [...waived] : [] };
  }

  #owner(): WorkerOwner {
    return {
      logPath: join(this.#context.paths.log, `vtpm-${this.#entry.name}.log`),
      log: this.#log,
      onMessage: (message) => this.#take(message),
    };
  }

  async #startWorker({ worker, ready, isFresh }: ClaimedWorker, vmRunId: string): Promise<void> {
    this.#state = { kind: 'starting', worker };
    try {
      const key = Buffer.from((await ready).publicKey, 'hex');
      worker.checkImage();
      const issued = await this.#context.office.issue({ ...this.#entry, vmRunId }, key, worker.image.digest);
      const { startup } = this.#entry;
      const hold = this.#context.settings['outage-hold'];
      const isServing = worker.waitFor('serving', SERVING_LIMIT_MS);
      worker.send({
        type: 'identity',
        ticket: ticketText(issued.ticket),
        managerKey: issued.managerKey,
        startup,
        outage: { holdMs: { tpm: hold, tcti: hold } },
      });
      isServing.catch(() => undefined);
      // Before a guest can get in, and while the worker and the manager are busy with the Load.
      this.#update({
        ...{ vmRunId, runningInBoot: bootId().toString('hex'), crashed: null },
        ...{ epoch: issued.epoch, manufactured: this.#entry.manufactured || issued.generation > 0 },
      });
      const { epoch, generation } = await isServing;
      if (generation < 1) {
        throw new ToolstackError('worker-failed', 'the worker wants to serve a TPM that is not saved yet');
      }
      if (!this.#entry.manufactured || this.#entry.epoch !== epoch) {
        this.#update({ manufactured: true, epoch });
      }
      const doors = await Doors.open(this.#directory(), accessOf(this.#entry), {
        connected: (door, id, peer, socket) =>
          worker.pass(socketFd(socket), { type: 'connection', door, id, peer }),
        peerGone: (peer) => worker.send({ type: 'peer-gone', peer }),
      });
      this.#state = { kind: 'running', worker, doors };
      void worker.ended.then((end) => this.#ended(worker, end));
      this.#log.info({ epoch, generation, pid: worker.pid }, 'running');
    } catch (error) {
      const hasEnded = worker.hasEnded;
      const end = await worker.kill();
      this.#lingering = end.lingering;
      const isWorkersFault = hasEnded ? wasLost(end) : isOutdated(error);
      if (isFresh || this.#isShuttingDown || !isWorkersFault) throw error;
      this.#log.warn(
        { reason: end.reason },
        'the worker from the pool was lost; a fresh one takes its place',
      );
      await this.#startWorker(await this.#context.pool.fresh(this.#entry.isolation, this.#owner()), vmRunId);
    }
  }

  #take(message: WorkerMessage): void {
    if (message.type === 'connection-closed' && 'doors' in this.#state) {
      this.#state.doors.forget(message.id);
    }
  }

  /** The worker ended. Where a stop is waiting for that, it deals with it. */
  #ended(worker: WorkerProcess, end: WorkerEnd): void {
    const state = this.#state;
    if (state.kind !== 'running' || state.worker !== worker) return;
    state.doors.close();
    this.#lingering = end.lingering;
    if (end.clean) {
      this.#state = { kind: 'stopped', reason: null };
      this.#tryUpdate({ runningInBoot: null });
      return;
    }
    this.#log.error(
      { reason: end.reason },
      'the worker crashed; start the vTPM again with a new run of its VM',
    );
    this.#state = { kind: 'crashed', reason: end.reason };
    this.#tryUpdate({ crashed: end.reason });
  }

  #update(change: Parameters<VtpmList['update']>[1]): void {
    this.#entry = this.#context.list.update(this.#entry.id, change);
  }

  /** For events that nobody waits for. What is not written is found again: `runningInBoot` still stands in the list. */
  #tryUpdate(change: Parameters<VtpmList['update']>[1]): void {
    try {
      this.#update(change);
    } catch (error) {
      this.#log.error({ reason: (error as Error).message }, 'the list of vTPMs cannot be written');
    }
  }

  #directory(): string {
    return join(this.#context.paths.supervisor.doors, this.#entry.name);
  }

  async #exclusively(operation: string, run: () => Promise<void>): Promise<void> {
    if (this.#operation) {
      const { name } = this.#operation;
      throw new ToolstackError('busy', `vTPM ${this.#entry.name} is being ${name}; try again later`);
    }
    if (this.#isRemoved) {
      // Another one may have its id by now, and with it the right to run the only worker (I-3).
      throw new ToolstackError('unknown-vtpm', `vTPM ${this.#entry.name} was removed`);
    }
    const running = run();
    this.#operation = { name: operation, settled: running.catch(() => undefined) };
    try {
      await running;
    } finally {
      this.#operation = undefined;
    }
  }
}

/** The copy that it was started from was touched since: a fresh one is of what is measured now. */
function isOutdated(error: unknown): boolean {
  return error instanceof ToolstackError && error.code === 'image-changed';
}

/** What ended it has to do with the worker or its link, and nothing with the vTPM. */
function wasLost({ failure, lingering }: WorkerEnd): boolean {
  return lingering.length === 0 && (failure === undefined || failure.reason === 'link-lost');
}
