import { ManagerError } from '../error.js';
import { Bucket } from '../grpc/limits.js';
import type { LiveSession } from './live-session.js';
import { USE_RATE } from './state-use.js';

/** Operations of a vTPM that wait for each other: workers come back again and again while the store does not answer. */
const MAX_PENDING = 32;

/**
 * The place of one vTPM in memory. Operations on it run one after the other; Load and retire are exclusive: a second
 * one does not wait, it is told who holds the vTPM and for how long.
 */
export class Slot {
  #live: LiveSession | undefined;
  /** The newest link of the session named here; an older one is a replay. */
  newestLink: { readonly sessionId: Uint8Array; readonly number: bigint } | undefined;
  #holder: { readonly operation: string; readonly since: number } | undefined;
  #tail: Promise<unknown> = Promise.resolve();
  #pending = 0;
  #uses: Bucket | undefined;

  /** @param onConnected told of each change of whether a worker is connected */
  constructor(
    readonly vtpmUuid: string,
    private readonly onConnected: (isConnected: boolean) => void,
  ) {}

  /** The session whose Save stream is connected now. */
  get live(): LiveSession | undefined {
    return this.#live;
  }

  set live(session: LiveSession | undefined) {
    if ((session === undefined) !== (this.#live === undefined)) this.onConnected(session !== undefined);
    this.#live = session;
  }

  /** What its workers say of its state. */
  get uses(): Bucket {
    this.#uses ??= new Bucket(USE_RATE);
    return this.#uses;
  }

  /** @throws ManagerError `busy` where so many wait already that nothing seems to end */
  async inOrder<T>(operation: () => Promise<T>): Promise<T> {
    if (this.#pending >= MAX_PENDING) {
      throw new ManagerError(
        'busy',
        `vTPM ${this.vtpmUuid} is busy: ${this.#pending} operations wait for the store; try again later`,
      );
    }
    this.#pending++;
    const run = this.#tail.then(operation).finally(() => this.#pending--);
    this.#tail = run.catch(() => undefined);
    return await run;
  }

  /** Nothing is remembered here that the record does not say. */
  get isDispensable(): boolean {
    return this.#pending === 0 && !this.#holder && !this.#live && !this.newestLink;
  }

  /** @throws ManagerError `busy` with holder and age */
  async exclusively<T>(name: string, operation: () => Promise<T>): Promise<T> {
    if (this.#holder) {
      const age = Math.round(performance.now() - this.#holder.since);
      throw new ManagerError(
        'busy',
        `vTPM ${this.vtpmUuid} is busy: a ${this.#holder.operation} has been running for ${age} ms; try again`,
      );
    }
    this.#holder = { operation: name, since: performance.now() };
    try {
      return await this.inOrder(operation);
    } finally {
      this.#holder = undefined;
    }
  }

  /** Resolves when nothing runs any more. */
  async idle(): Promise<void> {
    await this.#tail;
  }
}
