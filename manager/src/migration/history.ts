import type { Verdict } from 'vtpm-proto';
import type { AuditEvent } from '../audit/index.js';
import { ManagerError } from '../error.js';
import type { PendingDeparture } from '../ownership/departure.js';
import { MAX_REMEMBERED } from './limits.js';
import type { MigrationParts } from './ports.js';
import { hex, type MigrationView, type NameOf } from './view.js';

/** How migrations have ended: for who asks late, for who listens, and for the audit log. */
export class History {
  /** Those of this run of the manager, for a toolstack that was away. */
  readonly #ended = new Map<string, MigrationView>();

  constructor(private readonly parts: Pick<MigrationParts, 'host' | 'events' | 'audit' | 'log'>) {}

  /** By migration id, in hex; a copy. */
  get ended(): Map<string, MigrationView> {
    return new Map(this.#ended);
  }

  remember(view: MigrationView): void {
    this.#ended.delete(view.migration);
    this.#ended.set(view.migration, view);
    const [oldest] = this.#ended.keys();
    if (this.#ended.size > MAX_REMEMBERED && oldest !== undefined) this.#ended.delete(oldest);
  }

  /** It is durable here. */
  left({ vtpmUuid, departure }: PendingDeparture, verdict: Verdict): void {
    const migration = hex(departure.migrationId);
    const peer = this.nameOf(departure.destination);
    const { begunAt, description } = this.#ended.get(migration) ?? {};
    this.remember({
      ...{ begunAt, description, since: Date.now() },
      migration,
      id: vtpmUuid,
      role: 'source',
      mode: departure.mode,
      peer,
      state: verdict === 'COMMIT' ? 'committed' : 'aborted',
    });
    this.tell(migration, vtpmUuid, 'source', verdict, peer);
  }

  tell(migration: string, id: string, role: MigrationView['role'], verdict: Verdict, peer: string): void {
    this.parts.events.emit({ type: 'migration', migration, id, role, verdict, peer });
  }

  /** @param hostId 32 bytes @returns the peer's name, its id in hex where it is no peer any more */
  readonly nameOf: NameOf = (hostId) => {
    try {
      return this.parts.host.peer(hostId).name;
    } catch {
      return hex(hostId);
    }
  };

  /** What the log does not take keeps nothing from its end: what is decided is in the records. */
  async audit(event: AuditEvent): Promise<void> {
    await this.parts.audit(event).catch((error: unknown) => {
      const { code, message } = ManagerError.from(error);
      this.parts.log.warn({ action: event.action, reason: code }, `this is not in the audit log: ${message}`);
    });
  }
}
