import { setTimeout as delay } from 'node:timers/promises';
import { barrier, type Logger } from 'vtpm-common';
import { type SignedDecision, uuidToBytes, type Verdict } from 'vtpm-proto';
import { ManagerError } from '../error.js';
import type { PendingDeparture } from '../ownership/departure.js';
import { checkDecision } from './decision.js';
import { INQUIRE_AFTER_MS, LIMITS_MS, MAX_REMEMBERED } from './limits.js';
import type { Departures, Host } from './ports.js';
import { Talk } from './talk.js';

export interface ResolverParts {
  readonly host: Host;
  readonly departures: Departures;
  /** It is durable here. */
  readonly onDecided: (pending: PendingDeparture, verdict: Verdict) => void;
  readonly log: Logger;
  /** For tests: other pauses. */
  readonly pausesMs?: readonly number[] | undefined;
}

/** A departure of which it is not known here what became of it. */
interface Doubt {
  readonly pending: PendingDeparture;
  /** Ends the pause before the next inquiry. */
  wake: AbortController;
  attempts: number;
  reason: ManagerError | undefined;
  /** Of the inquiry under way, or the next one. */
  next: Promise<Verdict>;
  readonly over: Promise<Verdict>;
}

/**
 * Asks destinations what they decided, until they say so: nothing else ends a doubt. Alone it goes on with longer and longer
 * pauses, after a restart of the manager too.
 */
export class Resolver {
  readonly #doubts = new Map<string, Doubt>();
  /** The newest ones, for who asks late. */
  readonly #decided = new Map<string, Verdict>();
  readonly #ended = new AbortController();

  constructor(private readonly parts: ResolverParts) {}

  /** What the last run of the manager left. A record that cannot be read keeps nothing else from going on. */
  async start(): Promise<void> {
    try {
      for (const pending of await this.parts.departures.pending()) this.#doubt(pending);
    } catch (error) {
      const { code, message } = ManagerError.from(error);
      this.parts.log.error({ reason: code }, `which migrations are in doubt cannot be told: ${message}`);
    }
  }

  /** Resolves when it is decided, which may be never. Rejects when the manager ends. */
  ask(pending: PendingDeparture): Promise<Verdict> {
    return this.#doubt(pending).over;
  }

  /**
   * Asks now, once.
   * @throws ManagerError `in-doubt` where the destination does not say; its cause is why
   */
  async askNow(pending: PendingDeparture): Promise<Verdict> {
    const doubt = this.#doubt(pending);
    doubt.wake.abort();
    return await doubt.next;
  }

  /** It is durable here what becomes of it: whoever waits for its destination waits no more. */
  settle(pending: PendingDeparture, verdict: Verdict): void {
    const { migrationId } = pending.departure;
    this.#remember(migrationId, verdict);
    this.parts.onDecided(pending, verdict);
    this.#doubts.get(nameOf(migrationId))?.wake.abort();
  }

  /** Why it is not known yet; undefined where nothing is in doubt. */
  reasonOf(
    migrationId: Uint8Array,
  ): { readonly attempts: number; readonly reason: ManagerError | undefined } | undefined {
    return this.#doubts.get(nameOf(migrationId));
  }

  /**
   * What the destination decided, written down here. Can be repeated.
   * @throws ManagerError `decision-forged`, or the store's
   */
  async apply(pending: PendingDeparture, signed: SignedDecision): Promise<Verdict> {
    const { departures, host } = this.parts;
    const { vtpmUuid, epoch, generation, departure } = pending;
    const decision = checkDecision(signed, {
      migrationId: departure.migrationId,
      source: host.hostId,
      destination: departure.destination,
      vtpmUuid: uuidToBytes(vtpmUuid),
      epoch,
      generation,
    });
    if (decision.verdict === 'COMMIT') {
      barrier('migrate.source.commit');
      await departures.commit(vtpmUuid, signed);
      barrier('migrate.source.committed');
    } else {
      barrier('migrate.source.abort');
      await departures.abort(vtpmUuid, signed);
      barrier('migrate.source.aborted');
    }
    this.settle(pending, decision.verdict);
    return decision.verdict;
  }

  /** Of this run of the manager. */
  verdictOf(migrationId: Uint8Array): Verdict | undefined {
    return this.#decided.get(nameOf(migrationId));
  }

  #remember(migrationId: Uint8Array, verdict: Verdict): void {
    this.#decided.set(nameOf(migrationId), verdict);
    const [oldest] = this.#decided.keys();
    if (this.#decided.size > MAX_REMEMBERED && oldest !== undefined) this.#decided.delete(oldest);
  }

  async stop(): Promise<void> {
    this.#ended.abort();
    const doubts = [...this.#doubts.values()];
    for (const doubt of doubts) doubt.wake.abort();
    await Promise.allSettled(doubts.map(({ over }) => over));
  }

  #doubt(pending: PendingDeparture): Doubt {
    const name = nameOf(pending.departure.migrationId);
    const known = this.#doubts.get(name);
    if (known) return known;
    const doubt = { pending, wake: new AbortController(), attempts: 0 } as Partial<Doubt> & Doubt;
    this.#doubts.set(name, doubt);
    const over = this.#untilKnown(doubt).finally(() => this.#doubts.delete(name));
    // Who does not wait for it is not to end the process.
    over.catch(() => undefined);
    return Object.assign(doubt, { over });
  }

  async #untilKnown(doubt: Doubt): Promise<Verdict> {
    for (;;) {
      const attempt = this.#afterPause(doubt).then(
        () => this.verdictOf(doubt.pending.departure.migrationId) ?? this.#inquire(doubt.pending),
      );
      doubt.next = attempt.catch((error: unknown) => {
        throw inDoubt(doubt.pending, ManagerError.from(error));
      });
      doubt.next.catch(() => undefined);
      try {
        return await attempt;
      } catch (error) {
        if (this.#ended.signal.aborted || !(await this.#isPending(doubt))) throw error;
        doubt.reason = ManagerError.from(error);
        doubt.attempts += 1;
        this.parts.log.warn(
          { vtpm: doubt.pending.vtpmUuid, reason: doubt.reason.code, attempts: doubt.attempts },
          `a migration is in doubt: ${doubt.reason.message}`,
        );
      }
    }
  }

  async #afterPause(doubt: Doubt): Promise<void> {
    const pauses = this.parts.pausesMs ?? INQUIRE_AFTER_MS;
    const pause = pauses[Math.min(doubt.attempts, pauses.length - 1)];
    await delay(pause, undefined, { signal: doubt.wake.signal, ref: false }).catch(() => undefined);
    if (this.#ended.signal.aborted) throw new ManagerError('shutting-down', 'the manager is shutting down');
    doubt.wake = new AbortController();
  }

  /** Where the store does not say, it is. */
  async #isPending({ pending: { departure } }: Doubt): Promise<boolean> {
    const name = nameOf(departure.migrationId);
    if (this.#decided.has(name)) return true;
    const all = await this.parts.departures.pending().catch(() => undefined);
    return all?.some((other) => nameOf(other.departure.migrationId) === name) ?? true;
  }

  async #inquire(pending: PendingDeparture): Promise<Verdict> {
    const { host } = this.parts;
    const { vtpmUuid, epoch, generation, departure } = pending;
    const { migrationId } = departure;
    const talk = new Talk(await host.dial(host.peer(departure.destination)), 'source');
    const stop = (): void => talk.channel.close();
    this.#ended.signal.addEventListener('abort', stop, { once: true });
    try {
      const names = { migrationId, vtpmUuid: uuidToBytes(vtpmUuid) };
      await talk.send('INQUIRE', { ...names, epoch, generation });
      const { value } = await talk.receive('DECISION', LIMITS_MS.deciding.LIVE);
      const verdict = await this.apply(pending, value);
      // Where this is lost it is asked for.
      await talk.send('SETTLED', names).catch(() => undefined);
      return verdict;
    } finally {
      this.#ended.signal.removeEventListener('abort', stop);
      talk.channel.close();
    }
  }
}

function nameOf(migrationId: Uint8Array): string {
  return Buffer.from(migrationId).toString('hex');
}

function inDoubt({ vtpmUuid, departure }: PendingDeparture, reason: ManagerError): ManagerError {
  return new ManagerError(
    'in-doubt',
    `nobody runs vTPM ${vtpmUuid} until the destination says what it decided (${reason.code}: ${reason.message}); ` +
      `bring it back, then: vtpmctl migrate resolve ${nameOf(departure.migrationId)}; where it is gone for good, with --fenced`,
    { cause: reason },
  );
}
