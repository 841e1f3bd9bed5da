import { setTimeout as delay } from 'node:timers/promises';
import { barrier } from 'vtpm-common';
import {
  bytesEqual,
  type MigrationHello,
  type PeerMessage,
  type SignedDecision,
  uuidToText,
  type Verdict,
} from 'vtpm-proto';
import { ManagerError } from '../error.js';
import { Bucket } from '../grpc/limits.js';
import type { PeerChannel } from '../peer/channel.js';
import { answerRescues } from '../rescue/exchange.js';
import { takesBack } from '../rescue/notice.js';
import { checkRight } from '../trust/peers.js';
import { DestinationMigration } from './destination.js';
import { EventDoorkeeper } from './doorkeeper.js';
import type { History } from './history.js';
import { checkLengths } from './lengths.js';
import { LIMITS_MS, MAX_SESSIONS, STRANGE_INQUIRIES } from './limits.js';
import type { Outgoing } from './outgoing.js';
import type { Arrivals, MigrationParts } from './ports.js';
import { Settler } from './settler.js';
import { Talk } from './talk.js';
import { type Arriving, because, hex, incomingOf, type MigrationView, viewOfArriving } from './view.js';
import type { Work } from './work.js';

/** What other hosts begin: vTPMs that come, and questions about those that came or went. */
export class Incoming {
  readonly #settler: Settler;
  readonly #doorkeeper: EventDoorkeeper;
  readonly #arriving = new Map<string, Arriving>();
  /** Those above, and those that are decided and not settled. */
  readonly #sessions = new Set<DestinationMigration>();
  /** Of hosts that ask, or tell what they rescued. */
  readonly #asking = new Set<PeerChannel>();
  /** By host id: its questions about migrations that nobody knows here. */
  readonly #strangers = new Map<string, Bucket>();

  constructor(
    private readonly parts: MigrationParts,
    private readonly outgoing: Pick<Outgoing, 'has' | 'pending' | 'askSoon'>,
    private readonly history: History,
    private readonly work: Work,
  ) {
    const { host, arrivals, log, pausesMs } = parts;
    const isLive = (migrationId: Uint8Array): boolean => this.#arriving.has(hex(migrationId));
    this.#settler = new Settler({ host, arrivals, log, pausesMs, isLive });
    this.#doorkeeper = new EventDoorkeeper({
      isThere: () => parts.events.isFollowed,
      announce: (hello) => parts.events.emit({ type: 'incoming', ...incomingOf(hello, history.nameOf) }),
    });
  }

  /** Goes on with what the last run of the manager left. */
  start(): void {
    this.#settler.start();
  }

  /** Another host has something to say. Never rejects; the channel is closed when it resolves. */
  async exchange(channel: PeerChannel): Promise<void> {
    await this.work.of(this.#converse(channel));
  }

  /** The toolstack takes what is to come. @throws ManagerError `unknown-migration` */
  accept(migration: string): void {
    this.#doorkeeper.accept(migration);
  }

  /**
   * The toolstack does not take it, or not any more.
   * @param why for the source @throws ManagerError `unknown-migration`
   */
  refuse(migration: string, why: string): void {
    const reason = new ManagerError(
      'migration-refused',
      `the toolstack of the destination does not take it: ${why}`,
    );
    const arriving = this.#arriving.get(migration);
    if (!arriving || this.#doorkeeper.isAsked(migration)) this.#doorkeeper.refuse(migration, reason);
    else arriving.session.end(reason);
  }

  /** @returns false where no such vTPM is to come */
  cancel(migration: string): boolean {
    const arriving = this.#arriving.get(migration);
    arriving?.session.end(new ManagerError('migration-aborted', 'the destination has given it up'));
    return arriving !== undefined;
  }

  /** What is to come from that host, and is not decided. @returns the id of a vTPM */
  comingFrom(hostId: Uint8Array): string | undefined {
    for (const { hello } of this.#arriving.values()) {
      if (bytesEqual(hello.source, hostId)) return uuidToText(hello.vtpmUuid);
    }
    return undefined;
  }

  views(): MigrationView[] {
    return [...this.#arriving.values()].map((arriving) => this.#viewOf(arriving));
  }

  async close(): Promise<void> {
    const error = new ManagerError(
      'shutting-down',
      'the manager is shutting down; ask again when it is back',
    );
    for (const session of this.#sessions) session.end(error);
    for (const channel of this.#asking) channel.close(error);
    await this.#settler.stop();
  }

  async #converse(channel: PeerChannel): Promise<void> {
    const talk = new Talk(channel, 'destination');
    try {
      this.work.checkOpen();
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
    await this.history.audit({
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
    this.history.remember({
      ...view,
      state: verdict === 'COMMIT' ? 'committed' : 'aborted',
      since: Date.now(),
      ...because(reason),
    });
    this.history.tell(view.migration, view.id, 'destination', verdict, view.peer);
  }

  #admit(hello: MigrationHello, session: DestinationMigration, peerName: string): string {
    const name = hex(hello.migrationId);
    if (this.#arriving.has(name) || this.outgoing.has(name)) {
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
    const pending = await this.outgoing.pending(hex(migrationId));
    if (pending) {
      // It is there, so it can be asked.
      this.outgoing.askSoon(pending);
      throw new ManagerError('migrating', 'the tombstone is not written yet');
    }
    if (this.outgoing.has(hex(migrationId)))
      throw new ManagerError('migrating', 'the migration is under way');
    const notices = await this.parts.rescues.held(talk.peer.hostId);
    if (notices.some((notice) => takesBack(notice, migrationId)))
      throw new ManagerError('moved', 'it was taken back here; the notice of that comes first');
    await talk.send('SETTLED', { migrationId, vtpmUuid });
    // Whoever asked ends it.
    await Promise.race([talk.channel.closed, delay(LIMITS_MS.settling, undefined, { ref: false })]);
  }

  #viewOf(arriving: Arriving): MigrationView {
    return viewOfArriving(
      arriving,
      this.history.nameOf,
      this.#doorkeeper.isAsked(hex(arriving.hello.migrationId)),
    );
  }
}
