import { bytesEqual, type MigrationHello, type RecordHeader } from 'vtpm-proto';
import { ManagerError } from '../error.js';
import { NO_MIGRATION, type TravellingState } from '../records/index.js';
import type { Place } from './place.js';
import { checkHere } from './ticket-check.js';

/**
 * Whether what is here lets a vTPM come.
 * @throws ManagerError `retired`, `migrating`, `migration-refused`, `wrong-vm`, `rollback-detected`
 */
export function checkWelcome(
  vtpmUuid: string,
  held: RecordHeader | undefined,
  { vmUuid, epoch, generation }: Pick<MigrationHello, 'vmUuid' | 'epoch' | 'generation'>,
): void {
  if (!held) return;
  if (held.kind !== 'MOVED') checkHere(vtpmUuid, held);
  if (held.kind === 'LIVE') {
    throw new ManagerError(
      'migration-refused',
      `vTPM ${vtpmUuid} lives on this host, at epoch ${held.epoch}: there is one copy of a vTPM`,
    );
  }
  if (!bytesEqual(held.vmUuid, vmUuid)) {
    throw new ManagerError('wrong-vm', `vTPM ${vtpmUuid} belonged to another VM when it left this host`);
  }
  if (epoch <= held.epoch || generation < held.generation) {
    throw new ManagerError(
      'rollback-detected',
      `vTPM ${vtpmUuid} left this host at epoch ${held.epoch} and generation ${held.generation}; what its source has, epoch ` +
        `${epoch} and generation ${generation}, is older`,
    );
  }
}

/**
 * Whether what came is what its source announced, saves since then included.
 * @throws ManagerError `wrong-vm`, `rollback-detected`
 */
export function checkIsExpected(
  { vtpmUuid, header: announced, hello }: Place,
  { header }: TravellingState,
): void {
  if (!bytesEqual(header.vmUuid, announced.vmUuid) || !bytesEqual(header.vmRunId, hello.vmRunId)) {
    throw new ManagerError(
      'wrong-vm',
      `the state that came for vTPM ${vtpmUuid} belongs to another VM, or run of it`,
    );
  }
  if (header.epoch !== announced.epoch || header.generation < announced.generation) {
    throw new ManagerError(
      'rollback-detected',
      `the state that came for vTPM ${vtpmUuid} is of epoch ${header.epoch} and generation ${header.generation}, its source ` +
        `announced ${announced.epoch} and ${announced.generation}`,
    );
  }
}

/**
 * An ABORT for what was committed and forgotten would bring a second copy to life.
 * @param epoch of what the source asks about
 * @throws ManagerError `in-doubt`
 */
export function checkNotSince(vtpmUuid: string, held: RecordHeader | undefined, epoch: bigint): void {
  if (!held || held.epoch <= epoch) return;
  throw new ManagerError(
    'in-doubt',
    `vTPM ${vtpmUuid} has been at epoch ${held.epoch} on this host, the source asks about epoch ${epoch}: its disk is an old ` +
      'one. Nobody says that it may go on there; see docs/migration.md, "An old disk"',
  );
}

/** Whether it was ended here because `host` has it, without a migration to there. */
export function isGivenUpTo({ kind, departure }: RecordHeader, host: Uint8Array): boolean {
  return (
    kind === 'MOVED' &&
    departure !== undefined &&
    bytesEqual(departure.migrationId, NO_MIGRATION) &&
    bytesEqual(departure.destination, host)
  );
}

/** @throws ManagerError `unknown-migration` where it is not that host's: others need not know that there is one */
export function asked<T extends { readonly source: Uint8Array }>(migration: T, by: Uint8Array): T {
  if (bytesEqual(migration.source, by)) return migration;
  throw new ManagerError('unknown-migration', 'this host knows of no such migration from there');
}
