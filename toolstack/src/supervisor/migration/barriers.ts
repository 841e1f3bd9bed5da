/** Where a supervisor may be killed in a migration: every step after which something else knows more than it. */
export const MIGRATION_BARRIERS = [
  { side: 'source', name: 'migrate.source.noted' },
  { side: 'source', name: 'migrate.source.reaping' },
  { side: 'source', name: 'migrate.source.reaped' },
  { side: 'source', name: 'migrate.source.ended' },
  { side: 'source', name: 'migrate.source.settled' },
  { side: 'destination', name: 'migrate.destination.entry' },
  { side: 'destination', name: 'migrate.destination.waiting' },
  { side: 'destination', name: 'migrate.destination.serving' },
  { side: 'destination', name: 'migrate.destination.shown' },
] as const;
