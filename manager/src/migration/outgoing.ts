import {
  bytesEqual,
  type SignedFencing,
  type SignedMigrateOrder,
  uuidToText,
  type Verdict,
} from 'vtpm-proto';
import { statusOf } from '../admin/http.js';
import type { AuditActor } from '../audit/index.js';
import { ManagerError, type ManagerErrorCode } from '../error.js';
import type { DepartureFacts, PendingDeparture } from '../ownership/departure.js';
import { notFenced } from '../rescue/fencing.js';
import type { History } from './history.js';
import { MAX_SESSIONS } from './limits.js';
import { OrderCheck } from './order-check.js';
import type { Orderer } from './order-progress.js';
import type { MigrationParts } from './ports.js';
import { Resolver } from './resolve.js';
import { type SourceEnd, SourceMigration } from './source.js';
import {
  hex,
  isCancellable,
  type MigrationView,
  unknownMigration,
  viewOfOrder,
  viewOfPending,
} from './view.js';
import type { Work } from './work.js';

/** What came of a doubt. */
export interface Resolved {
  readonly verdict: Verdict;
  /** Without the word of the destination: the operator's stands for it. */
  readonly takenBack: boolean;
}

interface Leaving {
  readonly session: SourceMigration;
  readonly cancel: AbortController;
}

/** Why a destination was not asked, which says nothing of it. */
const NOT_ASKED: ReadonlySet<ManagerErrorCode> = new Set(['shutting-down', 'unknown-peer', 'internal']);

/** The migrations of which this host is the source: orders, and what is in doubt. */
export class Outgoing {
  readonly #orders: OrderCheck;
  readonly #resolver: Resolver;
  readonly #leaving = new Map<string, Leaving>();

  constructor(
    private readonly parts: MigrationParts,
    private readonly history: History,
    private readonly work: Work,
  ) {
    const { host, departures, log, pausesMs } = parts;
    this.#orders = new OrderCheck(parts.orders);
    const onDecided = (pending: PendingDeparture, verdict: Verdict): void => history.left(pending, verdict);
    this.#resolver = new Resolver({ host, departures, log, pausesMs, onDecided });
  }

  /** Goes on with what the last run of the manager left. */
  async start(): Promise<void> {
    await this.#resolver.start();
  }

  /**
   * Carries an order out. Resolves when it has ended, well or not: the end and the last progress say how.
   * @throws ManagerError where the order is refused, before anything began
   */
  async migrate(
    signed: SignedMigrateOrder,
    orderer: Omit<Orderer, 'cancelled'>,
    cancel: AbortController,
  ): Promise<SourceEnd> {
    this.work.checkOpen();
    if (this.#leaving.size >= MAX_SESSIONS) {
      throw new ManagerError(
        'busy',
        `${MAX_SESSIONS} migrations are under way; order this one when one has ended`,
      );
    }
    const order = this.#orders.check(signed);
    const name = hex(order.migrationId);
    const about = {
      actor: { toolstackKey: hex(order.toolstackKey) },
      action: 'migrate-out',
      vtpm: uuidToText(order.vtpmUuid),
      facts: {
        migration: name,
        to: this.history.nameOf(order.destination),
        mode: order.mode,
        ...(order.dryRun && { dryRun: 'yes' }),
      },
    } as const;
    let facts: DepartureFacts;
    try {
      facts = await this.parts.departures.check(order);
    } catch (error) {
      const reason = ManagerError.from(error);
      await this.history.audit({ ...about, verdict: 'refused', reason });
      throw reason;
    }
    const session = new SourceMigration(
      { ...this.parts, order, orderer: { ...orderer, cancelled: cancel.signal }, resolver: this.#resolver },
      facts,
    );
    this.#leaving.set(name, { session, cancel });
    try {
      const end = await this.work.of(session.run());
      // What changes a record is in the log with it.
      if (end.at === 'aborted') await this.history.audit({ ...about, verdict: 'failed', reason: end.reason });
      if (end.at === 'checked') await this.history.audit({ ...about, verdict: 'done' });
      if (!order.dryRun) this.history.remember(viewOfOrder(session, this.history.nameOf, end));
      return end;
    } finally {
      this.#leaving.delete(name);
    }
  }

  /**
   * Asks the destination what it decided, now. A session that is open for it ends there.
   * @param fencing that the destination is gone for good: where it cannot be reached the vTPM goes on here
   * @throws ManagerError `in-doubt` where it does not say; `unknown-migration` where nothing is in doubt; `not-fenced` where
   * the statement is not believed, or the destination is there; `unknown-peer`
   */
  async resolve(migration: string, actor: AuditActor, fencing?: SignedFencing): Promise<Resolved> {
    const pending = await this.pending(migration);
    const known = this.#resolver.verdictOf(Buffer.from(migration, 'hex'));
    if (!pending) {
      if (known) return { verdict: known, takenBack: false };
      throw unknownMigration(migration);
    }
    const about = { actor, action: 'migrate-resolve', vtpm: pending.vtpmUuid } as const;
    try {
      if (fencing) this.parts.rescues.checkFenced(pending, fencing);
      const verdict = await this.work.of(this.#ask(pending, fencing !== undefined));
      if (verdict) {
        await this.history.audit({ ...about, verdict: 'done', facts: { migration, decision: verdict } });
        return { verdict, takenBack: false };
      }
      this.work.checkOpen();
      if (fencing) await this.work.of(this.#takeBack(pending, actor, fencing));
      return { verdict: 'ABORT', takenBack: true };
    } catch (error) {
      const reason = ManagerError.from(error);
      const verdict = fencing && statusOf(reason) < 500 ? 'refused' : 'failed';
      await this.history.audit({ ...about, verdict, reason, facts: { migration } });
      reason.isAudited = true;
      throw reason;
    }
  }

  /** @returns false where it is too late: it is with the destination; undefined where no such order is under way */
  cancel(migration: string): boolean | undefined {
    const leaving = this.#leaving.get(migration);
    leaving?.cancel.abort();
    return leaving && isCancellable(leaving.session);
  }

  /** It is under way. @param migration its id in hex */
  has(migration: string): boolean {
    return this.#leaving.has(migration);
  }

  /** An order to that host is under way. @returns the id of its vTPM */
  goingTo(hostId: Uint8Array): string | undefined {
    for (const { session } of this.#leaving.values()) {
      const { destination, vtpmUuid } = session.order;
      if (bytesEqual(destination, hostId)) return uuidToText(vtpmUuid);
    }
    return undefined;
  }

  /** Its destination is there to be asked. Nobody waits for what it says. */
  askSoon(pending: PendingDeparture): void {
    void this.#resolver.askNow(pending).catch(() => undefined);
  }

  /** On its way, and waiting for its destination. @param migration its id in hex */
  async pending(migration: string): Promise<PendingDeparture | undefined> {
    const all = await this.parts.departures.pending();
    return all.find(({ departure }) => hex(departure.migrationId) === migration);
  }

  async views(): Promise<MigrationView[]> {
    const { nameOf, ended } = this.history;
    const pending = await this.parts.departures.pending();
    const doubts = pending.map((doubt) => {
      const { migrationId } = doubt.departure;
      const { begunAt, description } = ended.get(hex(migrationId)) ?? {};
      const reason = this.#resolver.reasonOf(migrationId)?.reason;
      return { begunAt, description, ...viewOfPending(doubt, nameOf, reason) };
    });
    const leaving = [...this.#leaving.values()].map(({ session }) => viewOfOrder(session, nameOf));
    return [...doubts, ...leaving];
  }

  /** Ends what can be ended. */
  async close(): Promise<void> {
    for (const { cancel } of this.#leaving.values()) cancel.abort();
    await this.#resolver.stop();
  }

  /** @returns undefined where it cannot be reached and is said to be gone @throws ManagerError `in-doubt`, `not-fenced` */
  async #ask(pending: PendingDeparture, isFenced: boolean): Promise<Verdict | undefined> {
    try {
      return await this.#resolver.askNow(pending);
    } catch (error) {
      if (!isFenced) throw error;
      const { message, cause } = ManagerError.from(error);
      const code = cause instanceof ManagerError ? cause.code : undefined;
      // Only what dials says so, of this very attempt: whatever else went wrong is no sign that nobody is there.
      if (code === 'peer-unreachable') return undefined;
      if (code === undefined || NOT_ASKED.has(code)) throw error;
      throw notFenced(`the destination is there: ${message}`);
    }
  }

  async #takeBack(pending: PendingDeparture, actor: AuditActor, fencing: SignedFencing): Promise<void> {
    // Nothing more is sent there.
    const leaving = this.#leaving.get(hex(pending.departure.migrationId));
    leaving?.cancel.abort();
    await leaving?.session.hangUp();
    await this.parts.rescues.takeBack(actor, pending, fencing);
    this.#resolver.settle(pending, 'ABORT');
  }
}
