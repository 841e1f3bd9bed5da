import { setTimeout as delay } from 'node:timers/promises';
import { barrier, type Logger } from 'vtpm-common';
import {
  bytesEqual,
  type MigrationHello,
  type Peer,
  type PeerMessage,
  type SignedDecision,
  type SignedFencing,
  type SignedMigrateOrder,
  uuidToText,
  type Verdict,
} from 'vtpm-proto';
import { statusOf } from '../admin/http.js';
import type { AuditActor, AuditEvent } from '../audit/index.js';
import { ManagerError } from '../error.js';
import { Bucket } from '../grpc/limits.js';
import type { DepartureFacts, PendingDeparture } from '../ownership/departure.js';
import type { VtpmEvents } from '../ownership/events.js';
import type { PeerChannel } from '../peer/channel.js';
import { answerRescues, type RescueBook, type TakesBack } from '../rescue/exchange.js';
import { notFenced } from '../rescue/fencing.js';
import { takesBack } from '../rescue/notice.js';
import { checkRight } from '../trust/peers.js';
import { DestinationMigration } from './destination.js';
import { EventDoorkeeper } from './doorkeeper.js';
import { checkLengths } from './lengths.js';
import { LIMITS_MS, MAX_REMEMBERED, MAX_SESSIONS, STRANGE_INQUIRIES } from './limits.js';
import { OrderCheck, type OrderEnvironment } from './order-check.js';
import type { Arrivals, Attestor, Departures, Host } from './ports.js';
import { Resolver } from './resolve.js';
import { Settler } from './settler.js';
import { type Orderer, type SourceEnd, SourceMigration } from './source.js';
import { Talk } from './talk.js';
import {
  type Arriving,
  because,
  hex,
  incomingOf,
  inOrder,
  isCancellable,
  type MigrationView,
  viewOfArriving,
  viewOfOrder,
  viewOfPending,
} from './view.js';

export interface MigrationParts {
  readonly host: Host;
  readonly departures: Departures;
  readonly arrivals: Arrivals;
  /** What was rescued from other hosts, and from here. */
  readonly rescues: RescueBook & TakesBack;
  readonly attestor: Attestor;
  readonly orders: OrderEnvironment;
  readonly events: VtpmEvents;
  audit(event: AuditEvent): Promise<unknown>;
  readonly log: Logger;
  /** For tests: other pauses between two questions to another host. */
  readonly pausesMs?: readonly number[] | undefined;
}

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

/** The migrations of this host, in both directions. */
export class MigrationControl {
  readonly #orders: OrderCheck;
  readonly #resolver: Resolver;
  readonly #settler: Settler;
  readonly #doorkeeper: EventDoorkeeper;
  readonly #leaving = new Map<string, Leaving>();
  readonly #arriving = new Map<string, Arriving>();
  /** Those above, and those that are decided and not settled. */
  readonly #sessions = new Set<DestinationMigration>();
  /** Of hosts that ask, or tell what they rescued. */
  readonly #asking = new Set<PeerChannel>();
  /** By host id: its questions about migrations that nobody knows here. */
  readonly #strangers = new Map<string, Bucket>();
  /** Those that have ended in this run of the manager, for a toolstack that was away. */
  readonly #ended = new Map<string, MigrationView>();
  readonly #running = new Set<Promise<unknown>>();
  #isClosing = false;

  constructor(private readonly parts: MigrationParts) {
    const { host, departures, arrivals, log } = parts;
    this.#orders = new OrderCheck(parts.orders);
    this.#resolver = new Resolver({
      host,
      departures,
      log,
      pausesMs: parts.pausesMs,
      onDecided: (pending, verdict) => this.#onDecided(pending, verdict),
    });
    this.#settler = new Settler({
      host,
      arrivals,
      log,
      pausesMs: parts.pausesMs,
      isLive: (migrationId) => this.#arriving.has(hex(migrationId)),
    });
    this.#doorkeeper = new EventDoorkeeper({
      isThere: () => parts.events.isFollowed,
      announce: (hello) => parts.events.emit({ type: 'incoming', ...incomingOf(hello, this.#nameOf) }),
    });
  }

  /** Goes on with what the last run of the manager left. */
  async start(): Promise<void> {
    await this.#resolver.start();
    this.#settler.start();
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
    this.#checkOpen();
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
        to: this.#nameOf(order.destination),
        mode: order.mode,
        ...(order.dryRun && { dryRun: 'yes' }),
      },
    } as const;
    let facts: DepartureFacts;
    try {
      facts = await this.parts.departures.check(order);
    } catch (error) {
      const reason = ManagerError.from(error);
      await this.#audit({ ...about, verdict: 'refused', reason });
      throw reason;
    }
    const session = new SourceMigration(
      { ...this.parts, order, orderer: { ...orderer, cancelled: cancel.signal }, resolver: this.#resolver },
      facts,
    );
    this.#leaving.set(name, { session, cancel });
    try {
      const end = await this.#track(session.run());
      // What changes a record is in the log with it.
      if (end.at === 'aborted') await this.#audit({ ...about, verdict: 'failed', reason: end.reason });
      if (end.at === 'checked') await this.#audit({ ...about, verdict: 'done' });
      if (!order.dryRun) this.#remember(viewOfOrder(session, this.#nameOf, end));
      return end;
    } finally {
      this.#leaving.delete(name);
    }
  }

  /** Another host has something to say. Never rejects; the channel is closed when it resolves. */
  async exchange(channel: PeerChannel): Promise<void> {
    await this.#track(this.#converse(channel));
  }

  async list(): Promise<MigrationView[]> {
    const pending = await this.parts.departures.pending();
    const views = new Map(this.#ended);
    for (const { migrationId, vtpmUuid, source } of this.parts.arrivals.unsettled()) {
      const migration = hex(migrationId);
      views.set(migration, {
        ...views.get(migration),
        migration,
        id: vtpmUuid,
        role: 'destination',
        peer: this.#nameOf(source),
        state: 'committed',
      });
    }
    for (const doubt of pending) {
      const { migrationId } = doubt.departure;
      const reason = this.#resolver.reasonOf(migrationId)?.reason;
      const { begunAt, description } = views.get(hex(migrationId)) ?? {};
      views.set(hex(migrationId), { begunAt, description, ...viewOfPending(doubt, this.#nameOf, reason) });
    }
    for (const [migration, { session }] of this.#leaving)
      views.set(migration, viewOfOrder(session, this.#nameOf));
    for (const [migration, arriving] of this.#arriving) views.set(migration, this.#viewOf(arriving));
    return inOrder(views.values());
  }

  /** @param migration 32 hex digits @throws ManagerError `unknown-migration` */
  async view(migration: string): Promise<MigrationView> {
    const found = (await this.list()).find((view) => view.migration === migration);
    if (!found) throw unknown(migration);
    return found;
  }

  /**
   * Asks the destination what it decided, now. A session that is open for it ends there.
   * @param fencing that the destination is gone for good: where it cannot be reached the vTPM goes on here
   * @throws ManagerError `in-doubt` where it does not say; `unknown-migration` where nothing is in doubt; `not-fenced` where
   * the statement is not believed, or the destination is there; `unknown-peer`
   */
  async resolve(migration: string, actor: AuditActor, fencing?: SignedFencing): Promise<Resolved> {
    const pending = await this.#pending(migration);
    const known = this.#resolver.verdictOf(Buffer.from(migration, 'hex'));
    if (!pending) {
      if (known) return { verdict: known, takenBack: false };
      throw unknown(migration);
    }
    const about = { actor, action: 'migrate-resolve', vtpm: pending.vtpmUuid } as const;
    try {
      if (fencing) this.parts.rescues.checkFenced(pending, fencing);
      const verdict = await this.#track(this.#ask(pending, fencing !== undefined));
      if (verdict) {
        await this.#audit({ ...about, verdict: 'done', facts: { migration, decision: verdict } });
        return { verdict, takenBack: false };
      }
      if (fencing) await this.#track(this.#takeBack(pending, actor, fencing));
      return { verdict: 'ABORT', takenBack: true };
    } catch (error) {
      const reason = ManagerError.from(error);
      const verdict = fencing && statusOf(reason) < 500 ? 'refused' : 'failed';
      await this.#audit({ ...about, verdict, reason, facts: { migration } });
      reason.isAudited = true;
      throw reason;
    }
  }

  /** @returns undefined where it cannot be reached and is said to be gone @throws ManagerError `in-doubt`, `not-fenced` */
  async #ask(pending: PendingDeparture, isFenced: boolean): Promise<Verdict | undefined> {
    try {
      return await this.#resolver.askNow(pending);
    } catch (error) {
      if (!isFenced) throw error;
      const { message } = ManagerError.from(error);
      if (this.#resolver.isThere(pending)) throw notFenced(`the destination is there: ${message}`);
      return undefined;
    }
  }

  async #takeBack(pending: PendingDeparture, actor: AuditActor, fencing: SignedFencing): Promise<void> {
    // Nothing more is sent there.
    this.#leaving.get(hex(pending.departure.migrationId))?.cancel.abort();
    await this.parts.rescues.takeBack(actor, pending, fencing);
    this.#resolver.settle(pending, 'ABORT');
  }

  /** The toolstack takes what is to come. @throws ManagerError `unknown-migration` */
  accept(migration: string): void {
    this.#doorkeeper.accept(migration);
  }

  /** @throws ManagerError `unknown-migration` */
  refuse(migration: string, why: string): void {
    this.#doorkeeper.refuse(migration, why);
  }

  /**
   * Takes an order back, or refuses what is to come. @returns false where it is too late: it is with the destination
   * @throws ManagerError `unknown-migration`
   */
  cancel(migration: string): boolean {
    const leaving = this.#leaving.get(migration);
    if (leaving) {
      leaving.cancel.abort();
      return isCancellable(leaving.session);
    }
    const arriving = this.#arriving.get(migration);
    if (!arriving) throw unknown(migration);
    arriving.session.end(new ManagerError('migration-aborted', 'the destination has given it up'));
    return true;
  }

  /**
   * Whether nothing that is open needs that host: without it as a peer it could neither be asked nor answer.
   * @throws ManagerError `in-doubt`
   */
  async checkNotNeeded({ hostId, name }: Pick<Peer, 'hostId' | 'name'>): Promise<void> {
    const { departures, arrivals } = this.parts;
    const pending = await departures.pending();
    const left = pending.find(({ departure }) => bytesEqual(departure.destination, hostId));
    if (left) {
      throw new ManagerError(
        'in-doubt',
        `vTPM ${left.vtpmUuid} is on its way to host ${name}, which alone can say what came of it; first: vtpmctl migrate ` +
          `resolve ${left.vtpmUuid}, where that host is gone for good with --fenced`,
      );
    }
    const came = arrivals.unsettled().find(({ source }) => bytesEqual(source, hostId));
    if (!came) return;
    throw new ManagerError(
      'in-doubt',
      `vTPM ${came.vtpmUuid} came from host ${name}, which has not said yet that it has given it up, and would ask in vain; bring ` +
        `the two hosts into contact first. One that is gone for good may stay a peer: vtpmctl peer change ${name} --no-send --no-receive`,
    );
  }

  async close(): Promise<void> {
    this.#isClosing = true;
    for (const { cancel } of this.#leaving.values()) cancel.abort();
    const error = new ManagerError(
      'shutting-down',
      'the manager is shutting down; ask again when it is back',
    );
    for (const session of this.#sessions) session.end(error);
    for (const channel of this.#asking) channel.close(error);
    await Promise.all([this.#resolver.stop(), this.#settler.stop()]);
    await Promise.allSettled(this.#running);
  }

  async #converse(channel: PeerChannel): Promise<void> {
    const talk = new Talk(channel, 'destination');
    try {
      this.#checkOpen();
      const first = await channel.receive(LIMITS_MS.hello);
      switch (first.type) {
        case 'HELLO':
          return await this.#arrive(channel, first);
        case 'INQUIRE':
          this.#asking.add(channel);
          return await this.#answer(new Talk(channel, 'destination', first));
        case 'UNSETTLED':
          this.#asking.add(channel);
          return await this.#saySettled(new Talk(channel, 'source', first));
        case 'RESCUED':
          this.#asking.add(channel);
          return await answerRescues(channel, first, this.parts.rescues);
        default:
          throw new ManagerError('bad-request', `a session does not begin with ${first.type}`);
      }
    } catch (error) {
      const reason = ManagerError.from(error);
      this.parts.log.warn({ reason: reason.code }, `a session of another host is refused: ${reason.message}`);
      await talk.refuse(reason);
    } finally {
      this.#asking.delete(channel);
      channel.close();
    }
  }

  async #arrive(channel: PeerChannel, first: PeerMessage): Promise<void> {
    const { log } = this.parts;
    const peerName = channel.peer.name;
    let name: string | undefined;
    const session: DestinationMigration = new DestinationMigration({
      ...this.parts,
      talk: new Talk(channel, 'destination', first),
      doorkeeper: this.#doorkeeper,
      admit: (hello) => {
        name = this.#admit(hello, session, peerName);
      },
      onCommitted: () => {
        const arriving = this.#arriving.get(name ?? '');
        if (!arriving) return;
        this.#arriving.delete(name ?? '');
        this.#onArrived(arriving, 'COMMIT');
      },
    });
    this.#sessions.add(session);
    const end = await session.run();
    this.#sessions.delete(session);
    const reason = end.at === 'ended' ? end.reason : undefined;
    log[reason ? 'warn' : 'info'](
      { peer: peerName, end: end.at, reason: reason?.code, migration: name },
      reason ? `a vTPM does not come: ${reason.message}` : 'a migration to this host has ended',
    );
    this.#settler.notice();
    const arriving = name === undefined ? undefined : this.#arriving.get(name);
    if (name === undefined || !arriving) return;
    this.#arriving.delete(name);
    if (arriving.hello.dryRun) return;
    this.#onArrived(arriving, 'ABORT', reason);
    await this.#audit({
      actor: 'manager',
      action: 'migrate-in',
      verdict: 'failed',
      vtpm: uuidToText(arriving.hello.vtpmUuid),
      facts: { migration: name, from: peerName, mode: arriving.hello.mode },
      ...(reason && { reason }),
    });
  }

  #onArrived(arriving: Arriving, verdict: Verdict, reason?: ManagerError): void {
    const view = this.#viewOf(arriving);
    this.#remember({
      ...view,
      state: verdict === 'COMMIT' ? 'committed' : 'aborted',
      since: Date.now(),
      ...because(reason),
    });
    this.#tell(view.migration, view.id, 'destination', verdict, view.peer);
  }

  #admit(hello: MigrationHello, session: DestinationMigration, peerName: string): string {
    const name = hex(hello.migrationId);
    if (this.#arriving.has(name) || this.#leaving.has(name)) {
      throw new ManagerError('busy', `the migration ${name} is under way already`);
    }
    if (this.#arriving.size >= MAX_SESSIONS) {
      throw new ManagerError(
        'busy',
        `${MAX_SESSIONS} vTPMs are on their way here; try again when one has arrived`,
      );
    }
    const own = [...this.#arriving.values()].filter((other) => bytesEqual(other.hello.source, hello.source));
    if (own.length >= MAX_SESSIONS / 2) {
      throw new ManagerError(
        'busy',
        `${own.length} vTPMs of this host are on their way here; try again when one has arrived`,
      );
    }
    this.#arriving.set(name, { session, hello, peerName });
    return name;
  }

  /** What the source may hear is for ever: the session ends first, so that nothing is committed behind the answer. */
  async #answer(talk: Talk): Promise<void> {
    const { arrivals } = this.parts;
    const { value: inquiry } = await talk.receive('INQUIRE', LIMITS_MS.hello);
    const { migrationId, vtpmUuid, epoch, generation } = inquiry;
    checkLengths('INQUIRE', [
      ['migration id', migrationId, 16],
      ['vTPM uuid', vtpmUuid, 16],
    ]);
    const source = talk.peer.hostId;
    const live = this.#arriving.get(hex(migrationId));
    if (live && !bytesEqual(live.hello.source, source)) {
      throw new ManagerError('unknown-migration', 'this migration is not from the host that asks');
    }
    if (!live && !(await arrivals.decisionOf(migrationId))) this.#admitStranger(talk);
    const signed = await this.#abort(live, { migrationId, vtpmUuid, source, epoch, generation });
    await talk.send('DECISION', signed);
    const { value } = await talk.receive('SETTLED', LIMITS_MS.settling);
    if (!bytesEqual(value.migrationId, migrationId)) return;
    barrier('migrate.destination.settle');
    await arrivals.settled(migrationId, source);
    barrier('migrate.destination.settled');
  }

  /** An ABORT of what was never heard of is written and counted: no peer may have as many as it likes. */
  #admitStranger({ peer }: Talk): void {
    checkRight(peer, 'send');
    const name = hex(peer.hostId);
    const bucket = this.#strangers.get(name) ?? new Bucket(STRANGE_INQUIRIES);
    this.#strangers.set(name, bucket);
    if (!bucket.take()) {
      throw new ManagerError(
        'rate-limited',
        'this host has asked for too many migrations that nobody knows here; try again later',
      );
    }
  }

  /** @returns the ABORT; the COMMIT where that was decided before; neither for another host's migration */
  async #abort(live: Arriving | undefined, facts: Parameters<Arrivals['abort']>[0]): Promise<SignedDecision> {
    live?.session.end(new ManagerError('migration-aborted', 'the source has asked for an end of it'));
    barrier('migrate.destination.abort');
    const signed = await this.parts.arrivals.abort(facts);
    barrier('migrate.destination.aborted');
    return signed;
  }

  /** The destination of an earlier migration asks whether it need not remember it any more. */
  async #saySettled(talk: Talk): Promise<void> {
    const { value } = await talk.receive('UNSETTLED', LIMITS_MS.hello);
    const { migrationId, vtpmUuid } = value;
    const pending = await this.#pending(hex(migrationId));
    if (pending) {
      // It is there, so it can be asked.
      void this.#resolver.askNow(pending).catch(() => undefined);
      throw new ManagerError('migrating', 'the tombstone is not written yet');
    }
    if (this.#leaving.has(hex(migrationId)))
      throw new ManagerError('migrating', 'the migration is under way');
    const notices = await this.parts.rescues.held(talk.peer.hostId);
    if (notices.some((notice) => takesBack(notice, migrationId)))
      throw new ManagerError('moved', 'it was taken back here; the notice of that comes first');
    await talk.send('SETTLED', { migrationId, vtpmUuid });
    // Whoever asked ends it.
    await Promise.race([talk.channel.closed, delay(LIMITS_MS.settling, undefined, { ref: false })]);
  }

  async #pending(migration: string): Promise<PendingDeparture | undefined> {
    const all = await this.parts.departures.pending();
    return all.find(({ departure }) => hex(departure.migrationId) === migration);
  }

  #onDecided({ vtpmUuid, departure }: PendingDeparture, verdict: Verdict): void {
    const migration = hex(departure.migrationId);
    const peer = this.#nameOf(departure.destination);
    const { begunAt, description } = this.#ended.get(migration) ?? {};
    this.#remember({
      ...{ begunAt, description, since: Date.now() },
      migration,
      id: vtpmUuid,
      role: 'source',
      mode: departure.mode,
      peer,
      state: verdict === 'COMMIT' ? 'committed' : 'aborted',
    });
    this.#tell(migration, vtpmUuid, 'source', verdict, peer);
  }

  #tell(migration: string, id: string, role: MigrationView['role'], verdict: Verdict, peer: string): void {
    this.parts.events.emit({ type: 'migration', migration, id, role, verdict, peer });
  }

  #remember(view: MigrationView): void {
    this.#ended.delete(view.migration);
    this.#ended.set(view.migration, view);
    const [oldest] = this.#ended.keys();
    if (this.#ended.size > MAX_REMEMBERED && oldest !== undefined) this.#ended.delete(oldest);
  }

  #viewOf(arriving: Arriving): MigrationView {
    return viewOfArriving(arriving, this.#nameOf, this.#doorkeeper.isAsked(hex(arriving.hello.migrationId)));
  }

  readonly #nameOf = (hostId: Uint8Array): string => {
    try {
      return this.parts.host.peer(hostId).name;
    } catch {
      return hex(hostId);
    }
  };

  /** What the log does not take keeps nothing from its end: what is decided is in the records. */
  async #audit(event: AuditEvent): Promise<void> {
    await this.parts.audit(event).catch((error: unknown) => {
      const { code, message } = ManagerError.from(error);
      this.parts.log.warn({ action: event.action, reason: code }, `this is not in the audit log: ${message}`);
    });
  }

  async #track<T>(work: Promise<T>): Promise<T> {
    this.#running.add(work);
    try {
      return await work;
    } finally {
      this.#running.delete(work);
    }
  }

  #checkOpen(): void {
    if (this.#isClosing) throw new ManagerError('shutting-down', 'the manager is shutting down; try again');
  }
}

function unknown(migration: string): ManagerError {
  return new ManagerError(
    'unknown-migration',
    `nothing is known here of a migration ${migration.slice(0, 32)}`,
  );
}
