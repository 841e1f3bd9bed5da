import { setTimeout as delay } from 'node:timers/promises';
import { barrier, type Logger } from 'vtpm-common';
import { ManagerError } from '../error.js';
import { metrics } from '../metrics.js';
import type { AnchorCounter } from '../root-tpm/index.js';
import type { AnchorFacts } from './anchor.js';
import type { AnchorState } from './anchored-store.js';

/** Milliseconds before each further attempt of a step; the last one again and again. */
const RETRY_AFTER_MS = [100, 500, 2_000, 10_000];

/** An increment that waits until the anchor on the disk states it. */
interface Prepared {
  readonly counted: Promise<bigint>;
  stated(): void;
  forgone(error: ManagerError): void;
}

/**
 * Advances the counter in the order that survives a crash: the next value is written in the anchor first, then the chip
 * counts. So the chip shows what the newest anchor says, or one less; an anchor from before the last step says less than
 * the chip for ever.
 */
export class CounterSteps {
  #isDue = false;
  #timer: NodeJS.Timeout | undefined;
  #stepping: Promise<void> | undefined;
  readonly #ended = new AbortController();
  #prepared: Prepared | undefined;
  #pendingSince: number | undefined;
  #stalled: AnchorState['stalled'];

  /**
   * @param value what the chip shows now
   * @param windowMs after which plain writes are counted
   * @param onDue called when a step should be taken
   */
  constructor(
    private readonly counter: AnchorCounter,
    private value: bigint,
    private readonly windowMs: number,
    private readonly log: Logger,
    private readonly onDue: () => void,
  ) {}

  /** What an anchor says that takes no step. */
  get stated(): bigint {
    return this.#stepping ? this.value + 1n : this.value;
  }

  /** The chip is counting: until it has, no anchor may say more. */
  get isStepping(): boolean {
    return this.#stepping !== undefined;
  }

  /** Plain writes have waited for a step as long as they may. */
  get isDue(): boolean {
    return this.#isDue;
  }

  /** There are plain writes that no step has covered. */
  get #isOpen(): boolean {
    return this.#timer !== undefined || this.#isDue;
  }

  get state(): AnchorState {
    return { pendingSince: this.#pendingSince, stalled: this.#stalled };
  }

  /** A plain write was committed. */
  noteWrite(): void {
    this.#pendingSince ??= Date.now();
    if (this.#timer || this.#isDue || this.#ended.signal.aborted) return;
    this.#timer = setTimeout(() => {
      this.#timer = undefined;
      this.#isDue = true;
      this.onDue();
    }, this.windowMs);
    this.#timer.unref();
  }

  /** An anchor that states a step is being written: the chip gets ready to count meanwhile. */
  prepare(): void {
    let settle: Pick<Prepared, 'stated' | 'forgone'> | undefined;
    const stated = new Promise<void>((resolve, reject) => {
      settle = { stated: resolve, forgone: reject };
    });
    const counted = this.counter.increment(stated);
    for (const either of [stated, counted]) either.catch(() => undefined);
    this.#prepared = settle && { counted, ...settle };
  }

  /** It could not be written, or whether it was is not known. */
  forgo(): void {
    this.#prepared?.forgone(new ManagerError('internal', 'no step was stated'));
    this.#prepared = undefined;
  }

  /**
   * Takes the step that the anchor on the disk says. It is tried until the chip answers: the anchor cannot be unsaid.
   * @throws ManagerError `rollback-detected` where somebody else counts too; `shutting-down` after `end`
   */
  take(): Promise<void> {
    clearTimeout(this.#timer);
    this.#timer = undefined;
    this.#isDue = false;
    barrier('anchor.stated');
    const began = Date.now();
    this.#pendingSince ??= began;
    this.#stepping = this.#step(this.value + 1n).then(() => {
      this.value += 1n;
      this.#stepping = undefined;
      this.#stalled = undefined;
      // Writes that came while the chip counted wait for the next step.
      this.#pendingSince = this.#isOpen ? began : undefined;
      metrics.anchorStep.add();
      barrier('anchor.counted');
    });
    return this.#stepping;
  }

  /** The step that was due could not be written: it is due again after another window. */
  postpone(): void {
    this.#isDue = false;
    this.noteWrite();
  }

  /** No further attempt of a step that fails. */
  end(): void {
    this.#ended.abort();
    clearTimeout(this.#timer);
  }

  #increment(): Promise<bigint> {
    const prepared = this.#prepared;
    this.#prepared = undefined;
    prepared?.stated();
    return prepared?.counted ?? this.counter.increment();
  }

  async #step(wanted: bigint): Promise<void> {
    for (let attempt = 0; ; attempt++) {
      try {
        // Of a step that failed it is not known whether the chip has counted.
        const now = attempt === 0 ? wanted - 1n : await this.counter.read();
        const after = now < wanted ? await this.#increment() : now;
        if (after === wanted) return;
        throw new ManagerError(
          'rollback-detected',
          `the TPM's counter shows ${after} instead of ${wanted}: another program counts with this installation's key, ` +
            'or a copy of this installation runs on the same TPM',
        );
      } catch (error) {
        const known = ManagerError.from(error, "the TPM's counter cannot be advanced");
        metrics.anchorFailure.add();
        this.#stalled = { since: this.#stalled?.since ?? Date.now(), reason: known };
        if (known.code === 'rollback-detected' || this.#ended.signal.aborted) throw known;
        this.log.warn(
          { reason: known.code },
          `the TPM's counter cannot be advanced, which is tried again: ${known.message}. ` +
            'Saves go on; what has to be counted first waits',
        );
        const pause = RETRY_AFTER_MS[Math.min(attempt, RETRY_AFTER_MS.length - 1)];
        await delay(pause, undefined, { ref: false, signal: this.#ended.signal }).catch(() => undefined);
      }
    }
  }
}

/** What the chip shows, and whether it lost count on the way there. */
export interface Reconciled {
  /** Which is then the anchor's. */
  readonly counter: bigint;
  /** Of the TPM, where its counter is orderly; 0 where it is not. */
  readonly resets: number;
  /** The TPM lost power with an orderly counter, which went ahead: the anchors of a block could not be told apart. */
  readonly isUnclean: boolean;
}

/**
 * Compares what the newest anchor says with the chip, and takes the steps that a crash has left out.
 *
 * After a reset of the TPM, an anchor from before it is taken where the chip is ahead of it by no more than an orderly
 * counter jumps. So the chip counts on until no other anchor from before is as near as that. The way leads over ends of
 * blocks, and another loss of power on it would take the chip too far from the newest anchor as well. Therefore the
 * newest says first where the way ends: from then on the chip is behind it, or ahead by one jump.
 * @param restate makes this anchor durable in the place of the newest
 * @throws ManagerError `rollback-detected`, and the TPM's
 */
export async function reconcile(
  counter: AnchorCounter,
  stated: AnchorFacts,
  restate: (next: AnchorFacts) => Promise<void>,
): Promise<Reconciled> {
  const ahead = counter.orderly?.ahead ?? 0n;
  const shown = await caughtUp(counter, stated.counter);
  const resets = (await counter.orderly?.resets()) ?? 0;
  if (stated.counter === shown && stated.resets === resets) {
    return { counter: shown, resets, isUnclean: stated.isUnclean };
  }
  if (stated.resets !== resets && stated.counter <= shown && shown <= stated.counter + ahead) {
    const isUnclean = stated.isUnclean || stated.counter < shown;
    const next = { ...stated, counter: shown + farthest(ahead), resets, isUnclean };
    await restate(next);
    barrier('anchor.restated');
    return reconcile(counter, next, restate);
  }
  throw new ManagerError(
    'rollback-detected',
    stated.counter < shown
      ? `the store is an old one: its anchor says ${stated.counter}, the TPM has counted to ${shown}. Put the newest store back; ` +
          'if it is lost, vtpmctl recover --accept-rollback says what goes back to what, and does it'
      : `the TPM's counter shows ${shown}, the store's anchor says ${stated.counter}: the TPM's memory was put back, or it is another TPM`,
  );
}

/** From the newest anchor before a reset, which may say one more than was shown, to where it is too far to be taken. */
function farthest(ahead: bigint): bigint {
  return ahead + 2n;
}

/** What the chip shows after the steps that an anchor has stated and a crash left out; unchanged where they are too many. */
async function caughtUp(counter: AnchorCounter, stated: bigint): Promise<bigint> {
  const { orderly } = counter;
  const shown = await counter.read();
  const missing = stated - shown;
  if (missing <= 0n || missing > (orderly ? farthest(orderly.ahead) : 1n)) return shown;
  barrier('anchor.reconcile');
  const after = orderly ? await orderly.countTo(stated) : await counter.increment();
  barrier('anchor.reconciled');
  return after;
}
