import type { Socket } from 'node:net';
import { setTimeout as delay } from 'node:timers/promises';
import { type Logger, shutDownSocket, socketFd } from 'vtpm-common';
import type { SupervisorMessage } from './control-protocol.js';
import { connectWorkerLinkAgain } from './manager-link.js';
import { RestartBudget } from './restart-budget.js';

/** A worker that keeps losing links gets them, and the log its lines, at a bounded rate. */
const LINK_PAUSE_MS = 200;
const PASS_RETRY_MS = 50;
/** Links that a worker gets as fast as it loses them, then one each ten seconds: all workers share what the manager takes. */
const LINKS_AT_ONCE = 8;

export interface LinkedWorker {
  readonly hasEnded: boolean;
  pass(descriptor: number, message: SupervisorMessage): void;
}

export type LinkState = 'linked' | 'wanting' | 'passed';

/**
 * New manager links for one worker, after a restart of the manager. The state is the worker's own: the next worker of
 * the same vTPM must not wait for, nor be taken for served by, what was going on for this one. A worker has one such link
 * at a time, whatever it says: links are what all workers of a supervisor share at the manager. The first one of a worker, and
 * one that it had before an upgrade of the supervisor, may stay open beside it.
 */
export class WorkerLinks {
  #state: LinkState;
  /** Of the link that the worker got last: what it has a copy of can be ended from here. */
  #passed: Socket | undefined;
  #passedAt = Number.NEGATIVE_INFINITY;
  readonly #budget = new RestartBudget(LINKS_AT_ONCE);

  constructor(
    private readonly worker: LinkedWorker,
    private readonly workerSocket: string,
    private readonly log: () => Logger,
    state: LinkState = 'linked',
  ) {
    this.#state = state === 'wanting' ? 'linked' : state;
    if (state === 'wanting') void this.lost();
  }

  get state(): LinkState {
    return this.#state;
  }

  get isLinked(): boolean {
    return this.#state === 'linked';
  }

  /** The worker says that it has no link: it gets one as soon as there is a manager. Never rejects. */
  async lost(): Promise<void> {
    if (this.#state === 'wanting') return;
    this.#state = 'wanting';
    this.end();
    this.log().warn('the manager is away: the worker holds what must be saved');
    this.#budget.spend();
    const { waitMs } = this.#budget;
    if (waitMs > 0) {
      this.log().warn('the worker lost its link too often; the next one comes within ten seconds');
    }
    const isSoon = performance.now() - this.#passedAt < LINK_PAUSE_MS;
    await this.#pause(Math.max(waitMs, isSoon ? LINK_PAUSE_MS : 0));
    while (this.#state === 'wanting') {
      const link = await connectWorkerLinkAgain(this.workerSocket, () => !this.worker.hasEnded);
      if (!link) return;
      try {
        this.worker.pass(socketFd(link), { type: 'link' });
        this.#passed = link;
        this.#passedAt = performance.now();
        this.#state = 'passed';
      } catch (error) {
        link.destroy();
        if (this.worker.hasEnded) return;
        this.log().debug({ reason: (error as Error).message }, 'the new manager link cannot be passed yet');
        await delay(PASS_RETRY_MS);
      }
    }
  }

  async #pause(milliseconds: number): Promise<void> {
    const until = performance.now() + milliseconds;
    for (let left = milliseconds; left > 0 && !this.worker.hasEnded; left = until - performance.now()) {
      await delay(Math.min(left, LINK_PAUSE_MS));
    }
  }

  /** Ends the link that was passed last, where there is one: the worker has ended, or says that it has no link. */
  end(): void {
    if (this.#passed && !this.#passed.destroyed) shutDownSocket(socketFd(this.#passed));
    this.#passed?.destroy();
    this.#passed = undefined;
  }

  /** The worker says that the link works. */
  up(): void {
    if (this.#state !== 'passed') return;
    this.#state = 'linked';
    this.log().info('the worker is connected to the manager again');
  }
}
