import { bytesEqual, type Peer, type SignedFencing, type SignedMigrateOrder } from 'vtpm-proto';
import type { AuditActor } from '../audit/index.js';
import { ManagerError } from '../error.js';
import type { PeerChannel } from '../peer/channel.js';
import { History } from './history.js';
import { Incoming } from './incoming.js';
import type { Orderer } from './order-progress.js';
import { Outgoing, type Resolved } from './outgoing.js';
import type { MigrationParts } from './ports.js';
import type { SourceEnd } from './source.js';
import { hex, inOrder, type MigrationView, unknownMigration } from './view.js';
import { Work } from './work.js';

/** The migrations of this host, in both directions. */
export class MigrationControl {
  readonly #work = new Work();
  readonly #history: History;
  readonly #outgoing: Outgoing;
  readonly #incoming: Incoming;

  constructor(private readonly parts: MigrationParts) {
    this.#history = new History(parts);
    this.#outgoing = new Outgoing(parts, this.#history, this.#work);
    this.#incoming = new Incoming(parts, this.#outgoing, this.#history, this.#work);
  }

  /** Goes on with what the last run of the manager left. */
  async start(): Promise<void> {
    await this.#outgoing.start();
    this.#incoming.start();
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
    return await this.#outgoing.migrate(signed, orderer, cancel);
  }

  /** Another host has something to say. Never rejects; the channel is closed when it resolves. */
  async exchange(channel: PeerChannel): Promise<void> {
    await this.#incoming.exchange(channel);
  }

  async list(): Promise<MigrationView[]> {
    const views = this.#history.ended;
    for (const { migrationId, vtpmUuid, source } of this.parts.arrivals.unsettled()) {
      const migration = hex(migrationId);
      views.set(migration, {
        ...views.get(migration),
        migration,
        id: vtpmUuid,
        role: 'destination',
        peer: this.#history.nameOf(source),
        state: 'committed',
      });
    }
    for (const view of [...(await this.#outgoing.views()), ...this.#incoming.views()]) {
      views.set(view.migration, view);
    }
    return inOrder(views.values());
  }

  /** @param migration 32 hex digits @throws ManagerError `unknown-migration` */
  async view(migration: string): Promise<MigrationView> {
    const found = (await this.list()).find((view) => view.migration === migration);
    if (!found) throw unknownMigration(migration);
    return found;
  }

  /**
   * Asks the destination what it decided, now. A session that is open for it ends there.
   * @param fencing that the destination is gone for good: where it cannot be reached the vTPM goes on here
   * @throws ManagerError `in-doubt` where it does not say; `unknown-migration` where nothing is in doubt; `not-fenced` where
   * the statement is not believed, or the destination is there; `unknown-peer`
   */
  async resolve(migration: string, actor: AuditActor, fencing?: SignedFencing): Promise<Resolved> {
    return await this.#outgoing.resolve(migration, actor, fencing);
  }

  /** The toolstack takes what is to come. @throws ManagerError `unknown-migration` */
  accept(migration: string): void {
    this.#incoming.accept(migration);
  }

  /** @throws ManagerError `unknown-migration` */
  refuse(migration: string, why: string): void {
    this.#incoming.refuse(migration, why);
  }

  /**
   * Takes an order back, or refuses what is to come. @returns false where it is too late: it is with the destination
   * @throws ManagerError `unknown-migration`
   */
  cancel(migration: string): boolean {
    const isInTime = this.#outgoing.cancel(migration);
    if (isInTime !== undefined) return isInTime;
    if (this.#incoming.cancel(migration)) return true;
    throw unknownMigration(migration);
  }

  /**
   * Whether nothing that is open needs that host: without it as a peer it could neither be asked nor answer.
   * @throws ManagerError `in-doubt`; `busy` where a migration with it is under way
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
    if (came) {
      throw new ManagerError(
        'in-doubt',
        `vTPM ${came.vtpmUuid} came from host ${name}, which has not said yet that it has given it up, and would ask in vain; bring ` +
          `the two hosts into contact first. One that is gone for good may stay a peer: vtpmctl peer change ${name} --no-send --no-receive`,
      );
    }
    const moving = this.#outgoing.goingTo(hostId) ?? this.#incoming.comingFrom(hostId);
    if (moving === undefined) return;
    throw new ManagerError(
      'busy',
      `a migration of vTPM ${moving} with host ${name} is under way; wait for its end, or cancel it: vtpmctl migrate cancel`,
    );
  }

  async close(): Promise<void> {
    this.#work.close();
    await Promise.all([this.#outgoing.close(), this.#incoming.close()]);
    await this.#work.over();
  }
}
