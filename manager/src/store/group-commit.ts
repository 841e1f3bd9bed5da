import { barrier } from 'vtpm-common';
import type { AuditHead } from '../audit/index.js';
import { ManagerError } from '../error.js';
import { metrics } from '../metrics.js';
import { ANCHOR_KEY, sealAnchor } from './anchor.js';
import { CounterSteps } from './anchor-counter.js';
import type { AnchoredStore, AnchorOptions, AnchorState, Counting } from './anchored-store.js';
import { isStoreKey } from './limits.js';
import { type MerkleTree, type StagedTree, valueDigest } from './merkle-tree.js';
import { checkWrite, type StateStore, type StoreEntry } from './state-store.js';
import { type QueuedWrite, WriteQueue } from './write-queue.js';

/** What the disk says at the beginning. */
export interface OpenedAnchor {
  readonly anchorVersion: number;
  /** What the TPM shows, and the anchor says. */
  readonly counter: bigint;
  readonly audit: AuditHead;
  readonly resets: number;
  readonly isUnclean: boolean;
}

interface Waiter {
  resolve(): void;
  reject(error: ManagerError): void;
}

/** The store in service: see AnchoredStore. */
export class GroupCommitStore implements AnchoredStore {
  readonly auditAtOpen: AuditHead;
  readonly isUnclean: boolean;
  readonly #resets: number;
  readonly #steps: CounterSteps;
  #anchorVersion: number;
  /** Who wants a step although he writes nothing. */
  #countWaiters: Waiter[] = [];
  readonly #queue: WriteQueue;
  /** The commit under way. It never rejects. */
  #committing: Promise<void> | undefined;
  #committingKeys: ReadonlySet<string> = new Set();
  #isScheduled = false;
  /** Entries of the audit log that the anchor on the disk holds. */
  #anchoredAudit: bigint;
  /** The root of a commit of which it is not known whether it is on the disk. */
  #uncertain: Buffer | undefined;
  /** Why the store refuses everything. */
  #broken: ManagerError | undefined;
  #closing: Promise<void> | undefined;
  /** Something was written that no anchor has had counted. */
  #isUncounted = false;
  /** Resolves when the step under way has been taken, or failed. */
  #stepping: Promise<void> | undefined;

  constructor(
    private readonly store: StateStore,
    private readonly tree: MerkleTree,
    opened: OpenedAnchor,
    private readonly options: AnchorOptions,
  ) {
    this.#queue = new WriteQueue((key) => this.version(key));
    this.#anchorVersion = opened.anchorVersion;
    this.auditAtOpen = opened.audit;
    this.isUnclean = opened.isUnclean;
    this.#resets = opened.resets;
    this.#anchoredAudit = opened.audit.length;
    const { counter, windowMs, log } = options;
    this.#steps = new CounterSteps(counter, opened.counter, windowMs, log, () => this.#schedule());
  }

  get size(): number {
    return this.tree.size;
  }

  get treeBytes(): number {
    return this.tree.bytes;
  }

  get anchoring(): AnchorState {
    return this.#steps.state;
  }

  get roots(): readonly Buffer[] {
    return this.#uncertain ? [this.tree.root, this.#uncertain] : [this.tree.root];
  }

  get stated(): { root: Buffer; counter: bigint } {
    return { root: this.tree.root, counter: this.#steps.stated };
  }

  version(key: string): number {
    return this.tree.get(key)?.version ?? 0;
  }

  keys(after: string | undefined, limit: number): string[] {
    return this.tree.keys(after, limit);
  }

  async read(key: string): Promise<StoreEntry | undefined> {
    checkKey(key);
    for (;;) {
      this.#refuseIfEnded();
      const before = this.#fingerprint(key);
      const entry = await this.store.get(key);
      const read = fingerprintOf(entry);
      if (read === before || read === this.#fingerprint(key)) return entry;
      // A commit may have been overtaken: its content is on disk, and not yet in the tree.
      const isMoving = this.#committingKeys.has(key) || before !== this.#fingerprint(key);
      if (!isMoving) throw this.#break(corrupt(`${key} is not what was last written`));
      await this.#committing;
    }
  }

  write(
    key: string,
    expectedVersion: number,
    value: Uint8Array,
    counting: Counting = 'later',
  ): Promise<number> {
    return new Promise((resolve, reject) => {
      checkKey(key);
      this.#refuseIfEnded();
      checkWrite({ key, expectedVersion, value });
      this.#queue.push({ key, expectedVersion, value, counting, resolve, reject });
      this.#schedule();
    });
  }

  noteChange(): void {
    this.#steps.noteWrite();
  }

  count(): Promise<void> {
    return new Promise((resolve, reject) => {
      this.#refuseIfEnded();
      this.#countWaiters.push({ resolve, reject });
      this.#schedule();
    });
  }

  stopWaiting(): void {
    this.#steps.end();
  }

  close(): Promise<void> {
    this.#closing ??= this.#end();
    return this.#closing;
  }

  async #end(): Promise<void> {
    this.#steps.end();
    // An anchor from before the end is an old one from now on, and an audit log from before it is cut short.
    const hasNews = this.#isUncounted || this.options.auditHead().length !== this.#anchoredAudit;
    if (hasNews && !this.#broken) this.#countWaiters.push(IGNORED);
    while (this.#committing || this.#hasWork()) {
      await (this.#committing ?? this.#commitNext());
      await this.#stepping?.catch(() => undefined);
    }
    await this.#stepping?.catch(() => undefined);
    await this.store.close();
  }

  /** Not at once: writes of the same turn of the event loop share the first commit too. */
  #schedule(): void {
    if (this.#isScheduled || this.#committing) return;
    this.#isScheduled = true;
    queueMicrotask(() => {
      this.#isScheduled = false;
      void this.#commitNext();
    });
  }

  #commitNext(): Promise<void> {
    if (this.#committing) return this.#committing;
    if (this.#broken) return Promise.resolve();
    const batch = this.#queue.take(!this.#steps.isStepping);
    const isCounting = !this.#steps.isStepping && this.#wantsCounting(batch);
    if (batch.length === 0 && !isCounting) return Promise.resolve();
    this.#committingKeys = new Set(batch.map((write) => write.key));
    this.#committing = this.#commit(batch, isCounting).finally(() => {
      this.#committing = undefined;
      this.#committingKeys = new Set();
      if (this.#hasWork()) this.#schedule();
    });
    return this.#committing;
  }

  #wantsCounting(batch: readonly QueuedWrite[]): boolean {
    return (
      this.#steps.isDue || this.#countWaiters.length > 0 || batch.some(({ counting }) => counting === 'now')
    );
  }

  /** Something that the next commit would do. */
  #hasWork(): boolean {
    if (this.#broken) return false;
    if (this.#steps.isStepping) return this.#queue.hasUncounted;
    return !this.#queue.isEmpty || this.#countWaiters.length > 0 || this.#steps.isDue;
  }

  async #commit(batch: readonly QueuedWrite[], isCounting: boolean): Promise<void> {
    // Whoever asks while the commit is under way is not in it.
    const waiters = isCounting ? this.#countWaiters.splice(0) : [];
    if (isCounting) this.#steps.prepare();
    try {
      const staged = await this.#commitStaged(batch, isCounting);
      staged.apply();
      this.#uncertain = undefined;
      this.#anchorVersion++;
    } catch (cause) {
      const error = ManagerError.from(cause, 'the store cannot be written');
      this.#steps.forgo();
      // Of anything but a full disk it is not known whether it is on the disk.
      if (error.code === 'store-full') {
        this.#uncertain = undefined;
        if (isCounting) this.#steps.postpone();
      } else this.#break(error);
      for (const waiter of [...batch, ...waiters]) waiter.reject(error);
      return;
    }
    if (isCounting) this.#isUncounted = false;
    else if (batch.length > 0) this.#isUncounted = true;
    const counted = batch.filter(({ counting }) => counting === 'now');
    for (const write of batch) {
      if (write.counting === 'later') write.resolve(write.expectedVersion + 1);
    }
    if (isCounting) this.#take(counted, waiters);
    else if (batch.length > 0) this.#steps.noteWrite();
  }

  /** The anchor on the disk says the next value: has the TPM count, beside the commits that follow. */
  #take(counted: readonly QueuedWrite[], waiters: readonly Waiter[]): void {
    const settled = this.#steps.take().then(
      () => {
        for (const write of counted) write.resolve(write.expectedVersion + 1);
        for (const waiter of waiters) waiter.resolve();
      },
      (cause: unknown) => {
        const error = this.#break(ManagerError.from(cause));
        for (const waiter of [...counted, ...waiters]) waiter.reject(error);
      },
    );
    this.#stepping = settled.then(() => {
      this.#stepping = undefined;
      if (this.#hasWork()) this.#schedule();
    });
  }

  async #commitStaged(batch: readonly QueuedWrite[], isCounting: boolean): Promise<StagedTree> {
    const staged = this.tree.stage(
      batch.map(({ key, expectedVersion, value }) => ({
        key,
        version: expectedVersion + 1,
        digest: valueDigest(value),
      })),
    );
    const audit = this.options.auditHead();
    const anchor = sealAnchor(this.options.keys.current, {
      root: staged.root,
      counter: this.#steps.stated + (isCounting ? 1n : 0n),
      audit,
      resets: this.#resets,
      isUnclean: false,
    });
    this.#uncertain = staged.root;
    barrier('store.commit');
    const began = performance.now();
    const isCommitted = await this.store.commit([
      ...batch.map(({ key, expectedVersion, value }) => ({ key, expectedVersion, value })),
      { key: ANCHOR_KEY, expectedVersion: this.#anchorVersion, value: anchor },
    ]);
    metrics.commit(batch.length, (performance.now() - began) / 1000);
    barrier('store.committed');
    if (!isCommitted) throw corrupt('it was changed while the manager was running');
    this.#anchoredAudit = audit.length;
    return staged;
  }

  #break(error: ManagerError): ManagerError {
    const isFirst = !this.#broken;
    this.#broken ??= error;
    for (const waiter of [...this.#queue.clear(), ...this.#countWaiters.splice(0)]) waiter.reject(error);
    this.#steps.end();
    if (isFirst) this.options.onBroken?.(error);
    return error;
  }

  #refuseIfEnded(): void {
    if (this.#broken) throw this.#broken;
    if (this.#closing) throw new ManagerError('shutting-down', 'the store is being closed');
  }

  #fingerprint(key: string): string {
    const leaf = this.tree.get(key);
    return leaf ? fingerprint(leaf.version, leaf.digest) : '';
  }
}

function fingerprintOf(entry: StoreEntry | undefined): string {
  return entry ? fingerprint(entry.version, valueDigest(entry.value)) : '';
}

/** Version and content in one comparable value; '' is no record. */
function fingerprint(version: number, digest: Uint8Array): string {
  return `${version} ${Buffer.from(digest.buffer, digest.byteOffset, digest.length).toString('latin1')}`;
}

function checkKey(key: string): void {
  if (!isStoreKey(key) || key === ANCHOR_KEY) {
    throw new ManagerError('bad-request', 'this is no key of a record');
  }
}

const IGNORED: Waiter = { resolve: () => undefined, reject: () => undefined };

function corrupt(what: string): ManagerError {
  return new ManagerError('store-corrupt', `the store is damaged: ${what}; restore it from a backup`);
}
