import type { Logger, Paths, Settings } from 'vtpm-common';
import { ToolstackError } from '../../error.js';
import type { AdminClient, Incoming } from '../admin-client.js';
import { createArriving } from '../dropin/creation.js';
import { Creations } from '../dropin/creations.js';
import { checkFirstStart, checkNewName } from '../new-vtpm.js';
import type { Vtpm } from '../vtpm.js';
import type { WorkerLauncher } from '../worker-launcher.js';
import { asKnown, type Description, readDescription } from './description.js';
import { checkProtection } from './protection.js';

export interface DeskParts {
  readonly admin: AdminClient;
  readonly launcher: Pick<WorkerLauncher, 'check'>;
  readonly paths: Paths;
  readonly settings: Settings;
  readonly log: Logger;
  all(): Vtpm[];
  /** Forgets an entry that came to nothing. */
  forget(vtpm: Vtpm): Promise<void>;
}

/** Something of the manager's event stream. */
export interface ManagerEvent {
  readonly type?: unknown;
  readonly id?: unknown;
  readonly migration?: unknown;
}

const SETTLE_MS = 5_000;

/** What this host's toolstack does about migrations that others begin, and about those whose end it has not seen. */
export class MigrationDesk {
  readonly #parts: DeskParts;
  readonly #creations = new Creations();
  readonly #inHand = new Set<string>();
  readonly #timer: NodeJS.Timeout;
  #isClosed = false;

  constructor(parts: DeskParts) {
    this.#parts = parts;
    this.#timer = setInterval(() => this.#settleAgain(), SETTLE_MS).unref();
  }

  close(): void {
    this.#isClosed = true;
    clearInterval(this.#timer);
  }

  /** The manager has come, or nothing was heard of it for a while. Never rejects. */
  async look(): Promise<void> {
    await Promise.all(this.#unsettled().map((vtpm) => this.#settle(vtpm)));
    try {
      for (const incoming of await this.#parts.admin.incoming()) void this.#take(incoming);
    } catch (error) {
      this.#parts.log.debug({ reason: (error as Error).message }, 'the manager tells of no migrations');
    }
  }

  hear(event: ManagerEvent): void {
    if (event.type === 'incoming') {
      void this.#take(event as unknown as Incoming);
    } else if (event.type === 'migration') {
      const vtpm = this.#parts.all().find(({ entry }) => entry.migration?.id === event.migration);
      if (vtpm) void this.#settle(vtpm);
    }
  }

  /** An event is said once, and what it asked for may have failed. */
  #settleAgain(): void {
    for (const vtpm of this.#unsettled()) {
      if (vtpm.operation === undefined) void this.#settle(vtpm, 'debug');
    }
  }

  /** Those that are not being taken in. */
  #unsettled(): Vtpm[] {
    return this.#parts
      .all()
      .filter(({ entry: { migration } }) => migration && !this.#inHand.has(migration.id));
  }

  /** Never rejects. @param level of what is said where it fails */
  async #settle(vtpm: Vtpm, level: 'warn' | 'debug' = 'warn'): Promise<void> {
    const { log } = this.#parts;
    try {
      // Whoever is at it knows better, and may leave it as it is.
      await vtpm.settled;
      if (this.#isClosed || !vtpm.entry.migration) return;
      if ((await vtpm.travels.settle()) === 'nothing') await this.#parts.forget(vtpm);
    } catch (error) {
      // It is asked again, and when the manager comes or says more.
      const { code, message } = ToolstackError.from(error);
      log[level](
        { vtpm: vtpm.entry.name, code, reason: message },
        'what came of a migration is not known yet',
      );
    }
  }

  /** Never rejects. */
  async #take(incoming: Incoming): Promise<void> {
    const { admin, log } = this.#parts;
    const { migration, id, from } = incoming;
    if (this.#isClosed || this.#inHand.has(migration)) return;
    this.#inHand.add(migration);
    try {
      const description = readDescription(incoming.description);
      const { isolation } = this.#check(incoming, description);
      if (incoming.mode !== 'OFFLINE') await this.#checkWorker(isolation);
      if (incoming.dryRun) {
        await admin.acceptMigration(migration);
        return;
      }
      const vtpm = await this.#entryOf(incoming, description);
      if ((await vtpm.travels.takeIn(incoming)) === 'nothing') await this.#parts.forget(vtpm);
    } catch (error) {
      const reason = ToolstackError.from(error, 'the vTPM cannot be taken in');
      log.warn({ vtpm: id, from: from.name, code: reason.code, reason: reason.message }, 'a vTPM is refused');
      await admin.refuseMigration(migration, reason).catch(() => undefined);
    } finally {
      this.#inHand.delete(migration);
    }
  }

  /**
   * Before anything stops at the source, and with `#checkWorker` all that there is of a dry run.
   * @returns how it would run here @throws ToolstackError `migration-refused` | `name-taken` | …
   */
  #check({ id, vmUuid, from }: Incoming, description: Description): Description {
    const { settings, paths } = this.#parts;
    const { name } = description;
    const accepts = settings['accept-migrations'];
    if (accepts === 'none') {
      throw new ToolstackError('migration-refused', 'this host takes no vTPMs (accept-migrations is none)');
    }
    const known = this.#parts.all().find(({ entry }) => entry.id === id);
    if (!known && accepts === 'known') {
      throw new ToolstackError(
        'migration-refused',
        `vTPM ${name} has never been on this host (accept-migrations is known)`,
      );
    }
    if (known && known.state !== 'moved') {
      throw new ToolstackError(
        'name-taken',
        `vTPM ${id} is ${known.state} here already, as ${known.entry.name}`,
      );
    }
    if (known && known.entry.vmUuid !== vmUuid) {
      throw new ToolstackError('migration-refused', `vTPM ${id} belongs to VM ${known.entry.vmUuid} here`);
    }
    if (!known && this.#parts.all().some(({ entry }) => entry.name === name)) {
      throw new ToolstackError(
        'name-taken',
        `another vTPM is called ${name} here; before it can come from ${from.name} one of the two needs another name`,
      );
    }
    if (!known) checkNewName(name);
    known?.checkDoors(description.doors);
    const asItRuns = known ? asKnown(description, known.entry) : description;
    checkProtection(asItRuns, settings, known?.entry);
    checkFirstStart(asItRuns, { paths, settings });
    return asItRuns;
  }

  /** What would refuse the worker that is to wait for it. @throws ToolstackError `image-not-allowed` | `layer-missing` | … */
  async #checkWorker(isolation: Description['isolation']): Promise<void> {
    const { admin, launcher } = this.#parts;
    const digest = launcher.check(isolation);
    if (await admin.isImageAllowed(digest)) return;
    throw new ToolstackError(
      'image-not-allowed',
      `the manager of this host does not allow the image of its workers; check it, then run there: vtpmctl image allow ${digest}`,
    );
  }

  /** @throws ToolstackError what vtpmctl says */
  async #entryOf(incoming: Incoming, description: Description): Promise<Vtpm> {
    const find = (): Vtpm | undefined => this.#parts.all().find(({ entry }) => entry.id === incoming.id);
    const { migration: id, from } = incoming;
    const known = find();
    if (known) {
      await known.travels.expect({ id, role: 'arriving', peer: from.name, isNew: false }, description);
      return known;
    }
    const done = await this.#creations.turn();
    try {
      await createArriving(this.#parts.paths, {
        ...description,
        ...{ id: incoming.id, vmUuid: incoming.vmUuid },
        migration: { id, role: 'arriving', peer: from.name, isNew: true },
      });
    } finally {
      done();
    }
    const made = find();
    if (!made) throw new ToolstackError('internal', 'vtpmctl has not made the entry');
    return made;
  }
}
