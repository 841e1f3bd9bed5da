import type { AuditEntry } from './audit/index.js';

/** What an audit log says that this host decided, by `hostId/migration` of the source, in hex. */
export type Told = Map<string, 'COMMIT' | 'ABORT'>;

/**
 * An ABORT is in the log when it is signed, and nothing was committed after it. That a commit was intended says nothing: it may
 * have come to be. Where a log that has both is to be believed, it is in what may not be undone.
 */
export function noteDecision(told: Told, { action, verdict, facts }: AuditEntry): void {
  const { migration, from } = facts ?? {};
  if (verdict !== 'done' || migration === undefined || from === undefined) return;
  const name = `${from}/${migration}`;
  if (action === 'migrate-commit') told.set(name, 'COMMIT');
  if (action === 'migrate-abort' && !told.has(name)) told.set(name, 'ABORT');
}
