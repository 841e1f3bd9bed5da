import { closeSync } from 'node:fs';
import type { Socket } from 'node:net';
import { setTimeout as delay } from 'node:timers/promises';
import { type Logger, receiveDescriptor, sendDescriptor, socketFd } from 'vtpm-common';
import { ToolstackError } from '../error.js';
import type { VmLayer } from '../vm/layers.js';
import type { HeldConfinement } from './confinement.js';
import type { SupervisorMessage, WorkerMessage } from './control-protocol.js';
import type { Entry } from './entry.js';
import type { KeptDescriptors } from './handover/descriptors.js';
import type { WorkerHandOver } from './handover/state.js';
import type { WorkerImage } from './image.js';
import { isWithin } from './is-within.js';
import type { Layer } from './layers.js';
import type { WorkerLedger } from './leftovers.js';
import { descendants, killAndWait, type ProcessId, processId } from './processes.js';
import type { WorkerBody, WorkerChild } from './worker-body.js';
import { failureOf, reasonOf, type WorkerEnd } from './worker-end.js';
import { checkUntouched } from './worker-images.js';
import { WorkerLinks } from './worker-links.js';
import { keepLog } from './worker-log.js';
import { WorkerMessages } from './worker-messages.js';

/** Whose worker it is at the moment. */
export interface WorkerOwner {
  /** Takes the worker's standard error. */
  readonly logPath: string;
  readonly log: Logger;
  /** What `waitFor` does not wait for, but for what is about links: those a worker gets whoever owns it. */
  onMessage(message: WorkerMessage): void;
}

export interface WorkerOptions {
  readonly body: WorkerBody;
  readonly confinement: HeldConfinement;
  /** What it executes. Of one that was taken over, only its digest is known. */
  readonly image: WorkerImage | Pick<WorkerImage, 'digest'>;
  readonly isolation: Entry['isolation'];
  readonly ledger: WorkerLedger;
  /** Where further links come from. */
  readonly workerSocket: string;
  readonly owner: WorkerOwner;
  /** What the program before this one knew of it. */
  readonly before?: WorkerHandOver;
}

/** What it said before its end is read by then. */
const LAST_WORDS_MS = 1000;
/** How long a worker whose process is gone already may take to be known as ended. */
const ENDING_MS = 1000;
type Waiter = { type: WorkerMessage['type']; resolve(message: WorkerMessage): void };

/** One worker and what is around it: its sandbox, its control channel and its descriptor channel. */
export class WorkerProcess {
  readonly startedAt: Date;
  /** Resolves, and never rejects, when nothing of the worker can run any more. */
  readonly ended: Promise<WorkerEnd>;
  readonly #child: WorkerChild;
  readonly #control: Socket;
  readonly #output: Socket | undefined;
  readonly #options: WorkerOptions;
  readonly #waiters = new Set<Waiter>();
  readonly #links: WorkerLinks;
  readonly #messages: WorkerMessages;
  #owner: WorkerOwner;
  #descriptors: number;
  #processes: ProcessId[];
  #failure: WorkerEnd['failure'];
  #saidStopped: boolean;
  #layers: readonly (Layer | VmLayer)[] | undefined;
  #hasEnded = false;
  #overTime: number | undefined;

  /** @throws ToolstackError `internal` where it cannot be watched; it is killed then */
  constructor(options: WorkerOptions) {
    const { body, before } = options;
    this.#options = options;
    this.#owner = options.owner;
    this.#child = body.child;
    this.#control = body.control;
    this.#output = body.output;
    this.#descriptors = body.descriptors;
    this.startedAt = before ? new Date(before.startedAt) : new Date();
    this.#processes = before?.processes ?? [];
    this.#failure = before?.failure ?? undefined;
    this.#saidStopped = before?.saidStopped ?? false;
    const link = before?.link ?? 'linked';
    this.#links = new WorkerLinks(this, options.workerSocket, () => this.#owner.log, link);
    if (body.output) keepLog(body.output, () => this.#owner.logPath);
    this.#messages = new WorkerMessages(body.control, before?.pending, {
      take: (message) => this.#take(message),
      broken: (message) => {
        this.#failure ??= { reason: 'protocol', message };
        void this.kill();
      },
    });
    this.ended = this.#waitForEnd();
    try {
      if (before) options.ledger.add(before.processes);
      this.#noteProcesses();
    } catch (cause) {
      // A worker that the ledger does not name must not live; it has no ticket yet.
      this.#child.kill();
      throw new ToolstackError('internal', `the worker cannot be watched: ${(cause as Error).message}`, {
        cause,
      });
    }
  }

  /** Of node, not of the sandbox around it. */
  get pid(): number | undefined {
    return this.#processes.at(-1)?.pid;
  }

  get image(): WorkerOptions['image'] {
    return this.#options.image;
  }

  /**
   * That it executes what was measured. Before it gets an identity.
   * @throws ToolstackError `image-changed` | `worker-failed`
   */
  checkImage(): void {
    const { image, isolation } = this.#options;
    if (this.pid === undefined) throw new ToolstackError('worker-failed', 'the worker has ended');
    if (!('stamps' in image))
      throw new ToolstackError('internal', 'a worker that serves is not measured again');
    checkUntouched(image, isolation === 'none' ? undefined : `/proc/${this.pid}/root`);
  }

  /** That what it is executed from is as it was measured, whether it runs or not. @throws ToolstackError `image-changed` */
  checkFiles(): void {
    const { image } = this.#options;
    if ('stamps' in image) checkUntouched(image, undefined);
  }

  get hasEnded(): boolean {
    return this.#hasEnded;
  }

  /** It has a link to the manager, as far as it said. */
  get isLinked(): boolean {
    return this.#links.isLinked;
  }

  /** In force, by /proc: as they were seen last, unless `looksAgain`. */
  layers(looksAgain: boolean): readonly (Layer | VmLayer)[] {
    if (looksAgain || !this.#layers) this.#layers = this.#options.confinement.layers(this.pid ?? -1);
    return this.#layers;
  }

  /** From now on it is another one's. */
  giveTo(owner: WorkerOwner): void {
    this.#owner = owner;
  }

  /**
   * @throws ToolstackError `worker-failed` where the worker ends before or does not say it in time, `worker-late` where that
   * is `ready`, before it has anything of a vTPM; `layer-missing`
   */
  async waitFor<T extends WorkerMessage['type']>(
    type: T,
    limitMs: number,
  ): Promise<Extract<WorkerMessage, { type: T }>> {
    let waiter: Waiter | undefined;
    const said = new Promise<WorkerMessage>((resolve) => {
      waiter = { type, resolve };
      this.#waiters.add(waiter);
    });
    let timer: NodeJS.Timeout | undefined;
    const isLate = new Promise<'late'>((resolve) => {
      timer = setTimeout(() => resolve('late'), limitMs);
    });
    try {
      const first = await Promise.race([said, this.ended, isLate]);
      if (first === 'late') {
        throw new ToolstackError(
          type === 'ready' ? 'worker-late' : 'worker-failed',
          `the worker did not become ${type} within ${limitMs} ms; look into ${this.#owner.logPath}`,
        );
      }
      if (!('type' in first)) throw failureOf(first, this.#owner.logPath);
      if (type === 'ready') {
        // The sandbox has executed node by the time of the first message, so now all processes are there.
        this.#noteProcesses();
        await this.#checkConfinement();
      }
      return first as Extract<WorkerMessage, { type: T }>;
    } finally {
      clearTimeout(timer);
      if (waiter) this.#waiters.delete(waiter);
    }
  }

  /** @throws ToolstackError `layer-missing`; `worker-failed` where it has ended, so that nothing is known of its layers */
  async #checkConfinement(): Promise<void> {
    try {
      this.#layers = this.#options.confinement.check(this.pid ?? -1);
    } catch (error) {
      const end = await Promise.race([this.ended, delay(ENDING_MS, undefined, { ref: false })]);
      throw end ? failureOf(end, this.#owner.logPath) : error;
    }
  }

  send(message: SupervisorMessage): void {
    if (!this.#control.destroyed) this.#control.write(`${JSON.stringify(message)}\n`);
  }

  /** Hands over copies of descriptors and then says what they are. @throws as `pass` */
  passAll(descriptors: readonly number[], message: SupervisorMessage): void {
    if (this.#hasEnded) throw new ToolstackError('worker-failed', 'the worker has ended');
    for (const descriptor of descriptors) sendDescriptor(this.#descriptors, descriptor);
    this.send(message);
  }

  /** Hands over a copy of a descriptor and then says what it is. @throws SystemCallError where the channel is full or closed */
  pass(descriptor: number, message: SupervisorMessage): void {
    this.passAll([descriptor], message);
  }

  /** What it has sent over the descriptor channel, which goes in both directions. @returns undefined where nothing is there */
  takeDescriptor(): number | undefined {
    return this.#hasEnded ? undefined : receiveDescriptor(this.#descriptors);
  }

  /** Asks it to stop and save; kills it after `limitMs`. */
  async stop(limitMs: number): Promise<WorkerEnd> {
    this.send({ type: 'stop' });
    const timeout = new AbortController();
    const late = delay(limitMs, undefined, { signal: timeout.signal }).then(
      () => {
        this.#overTime = limitMs;
        return this.kill();
      },
      () => undefined,
    );
    const end = await this.ended;
    timeout.abort();
    await late;
    return end;
  }

  /** SIGKILL to every process of it. */
  async kill(): Promise<WorkerEnd> {
    await this.endProcesses().catch(() => undefined);
    return this.ended;
  }

  /** As `kill`. Resolves when none of them can run any more; `ended` follows. @throws ToolstackError `busy` */
  async endProcesses(): Promise<void> {
    try {
      this.#noteProcesses();
    } catch {
      // Those that are known, and the one that holds the others.
      this.#child.kill();
    }
    await killAndWait(this.#processes);
  }

  /** Resolves when nothing is on its way to it any more, it has ended, or `limitMs` have passed. */
  async whenHeard(limitMs: number): Promise<void> {
    const heard = new Promise<void>((resolve) => this.#control.write('', () => resolve()));
    await isWithin(Promise.race([heard, this.ended]), limitMs);
  }

  /**
   * What the next program needs to know of it. Where it does not listen any more, the control channel is left out: the
   * next program will end it.
   */
  handOver(kept: KeptDescriptors): WorkerHandOver {
    // Where it had to wait, what was read and not looked at yet is only in this process.
    while (this.#control.read() !== null);
    const canBeHeard = !this.#control.destroyed && !this.#control.readableEnded;
    return {
      processes: this.#processes.map(({ pid, startTime }) => ({ pid, startTime })),
      startedAt: this.startedAt.toISOString(),
      imageDigest: this.image.digest,
      confinement: this.#options.confinement.handOver(),
      control: canBeHeard && this.#control.writableLength === 0 ? kept.keep(socketFd(this.#control)) : null,
      descriptors: kept.keep(this.#descriptors),
      output: this.#output && !this.#output.destroyed ? kept.keep(socketFd(this.#output)) : null,
      pending: this.#messages.pending,
      link: this.#links.state,
      failure: this.#failure ? { reason: this.#failure.reason, message: this.#failure.message } : null,
      saidStopped: this.#saidStopped,
    };
  }

  #take(message: WorkerMessage): void {
    if (message.type === 'failed') this.#failure ??= message;
    if (message.type === 'stopped') this.#saidStopped = true;
    for (const waiter of this.#waiters) {
      if (waiter.type === message.type) {
        this.#waiters.delete(waiter);
        waiter.resolve(message);
        return;
      }
    }
    if (message.type === 'link-lost') void this.#links.lost();
    else if (message.type === 'link-up') this.#links.up();
    else this.#owner.onMessage(message);
  }

  #noteProcesses(): void {
    const { pid } = this.#child;
    const own = pid === undefined || this.#child.hasExited ? undefined : processId(pid);
    if (!own) return;
    const known = new Set(this.#processes.map((process) => process.pid));
    const found = [own, ...descendants(own.pid)].filter((process) => !known.has(process.pid));
    if (found.length === 0) return;
    this.#processes = [...this.#processes, ...found];
    this.#options.ledger.add(found);
  }

  async #waitForEnd(): Promise<WorkerEnd> {
    const closed = new Promise<void>((resolve) => this.#control.once('close', () => resolve()));
    const status = await this.#child.exited;
    let lingering: readonly ProcessId[] = [];
    await killAndWait(this.#processes).catch(() => {
      lingering = this.#processes;
    });
    this.#links.end();
    // The last lines may still be on their way; nobody is left who could add to them.
    await isWithin(closed, LAST_WORDS_MS);
    this.#hasEnded = true;
    this.#control.destroy();
    if (lingering.length === 0) {
      this.#options.ledger.remove(this.#processes);
      await this.#options.confinement.release();
    }
    // Last: until the end is told, this worker may be handed over, and every descriptor that is named must be open.
    closeSync(this.#descriptors);
    this.#descriptors = -1;
    return {
      reason: reasonOf(status, this.#failure, this.#overTime),
      failure: this.#failure,
      clean: this.#saidStopped && status === 'exit status 0',
      lingering,
    };
  }
}
