import { type MigrateMode, type MigrationHello, uuidToText } from 'vtpm-proto';
import { ManagerError } from '../error.js';
import type { PendingDeparture } from '../ownership/departure.js';
import type { IncomingEvent } from '../ownership/events.js';
import type { DestinationMigration } from './destination.js';
import type { SourceEnd, SourceMigration } from './source.js';

/** One migration, as the admin plane tells of it. */
export interface MigrationView {
  readonly migration: string;
  readonly id: string;
  readonly role: 'source' | 'destination';
  /** Absent where a manager before this one knew it. */
  readonly mode?: MigrateMode;
  /** Name of the other host; its host id where it is no peer any more. */
  readonly peer: string;
  readonly state: 'preparing' | 'departing' | 'in-doubt' | 'committed' | 'aborted';
  /** Unix milliseconds; absent as above. */
  readonly begunAt?: number | undefined;
  /** Unix milliseconds: of its step while it is under way, otherwise of its state; absent as above. */
  readonly since?: number;
  /** What the source's toolstack says of the vTPM, where that is short. */
  readonly description?: string | undefined;
  /** Of its state machine, while it is under way. */
  readonly step?: string;
  readonly dryRun?: boolean;
  readonly reason?: string;
  readonly message?: string;
  /** It waits for the toolstack's answer: what the event said. */
  readonly incoming?: IncomingView;
}

/** What the event said. */
type IncomingView = Omit<IncomingEvent, 'type'>;

/** One that comes, and is not decided. */
export interface Arriving {
  readonly session: DestinationMigration;
  readonly hello: MigrationHello;
  readonly peerName: string;
}

/** @param hostId 32 bytes @returns the peer's name, its id in hex where it is no peer any more */
export type NameOf = (hostId: Uint8Array) => string;

export function viewOfOrder(session: SourceMigration, nameOf: NameOf, end?: SourceEnd): MigrationView {
  const { order, at, begunAt, since } = session;
  return {
    migration: hex(order.migrationId),
    id: uuidToText(order.vtpmUuid),
    role: 'source',
    mode: order.mode,
    peer: nameOf(order.destination),
    state: stateOf(at),
    step: at,
    ...{ begunAt, since },
    ...described(order),
    dryRun: order.dryRun,
    ...because(end && 'reason' in end ? end.reason : undefined),
  };
}

/** @param reason why it is not known what became of it */
export function viewOfPending(
  { vtpmUuid, departure }: PendingDeparture,
  nameOf: NameOf,
  reason: ManagerError | undefined,
): MigrationView {
  return {
    migration: hex(departure.migrationId),
    id: vtpmUuid,
    role: 'source',
    mode: departure.mode,
    peer: nameOf(departure.destination),
    state: 'in-doubt',
    since: Number(departure.at),
    ...because(reason),
  };
}

/** @param isAsked the toolstack here has not answered */
export function viewOfArriving(
  { session, hello, peerName }: Arriving,
  nameOf: NameOf,
  isAsked: boolean,
): MigrationView {
  return {
    migration: hex(hello.migrationId),
    id: uuidToText(hello.vtpmUuid),
    role: 'destination',
    mode: hello.mode,
    peer: peerName,
    state: 'preparing',
    step: session.at,
    begunAt: session.begunAt,
    since: session.since,
    ...described(hello),
    dryRun: hello.dryRun,
    ...(isAsked && { incoming: incomingOf(hello, nameOf) }),
  };
}

export function incomingOf(hello: MigrationHello, nameOf: NameOf): IncomingView {
  return {
    migration: hex(hello.migrationId),
    id: uuidToText(hello.vtpmUuid),
    vmUuid: uuidToText(hello.vmUuid),
    vmRunId: uuidToText(hello.vmRunId),
    epoch: hello.epoch,
    generation: hello.generation,
    mode: hello.mode,
    from: { name: nameOf(hello.source), hostId: hex(hello.source) },
    description: Buffer.from(hello.description).toString('utf8'),
    dryRun: hello.dryRun,
  };
}

/** Many are remembered, and another host writes them. */
const MAX_KEPT_DESCRIPTION_BYTES = 1024;

function described({ description }: Pick<MigrationHello, 'description'>): Pick<MigrationView, 'description'> {
  if (description.length === 0 || description.length > MAX_KEPT_DESCRIPTION_BYTES) return {};
  return { description: Buffer.from(description).toString('utf8') };
}

/** What is known of when, newest last. */
export function inOrder(views: Iterable<MigrationView>): MigrationView[] {
  const when = ({ begunAt, since }: MigrationView): number => begunAt ?? since ?? 0;
  return [...views].sort((one, other) => when(one) - when(other));
}

function stateOf(at: SourceMigration['at']): MigrationView['state'] {
  switch (at) {
    case 'departing':
    case 'sending':
    case 'deciding':
    case 'committing':
    case 'asking':
      return 'departing';
    case 'in-doubt':
      return 'in-doubt';
    case 'committed':
      return 'committed';
    case 'aborted':
    case 'thawing':
    case 'checked':
      return 'aborted';
    default:
      return 'preparing';
  }
}

/** Whether the destination has not got the state. */
export function isCancellable({ at }: SourceMigration): boolean {
  return stateOf(at) === 'preparing' || at === 'departing';
}

export function because(reason: ManagerError | undefined): Pick<MigrationView, 'reason' | 'message'> {
  return reason ? { reason: reason.code, message: reason.message } : {};
}

export function hex(bytes: Uint8Array): string {
  return Buffer.from(bytes).toString('hex');
}

/** @param migration in hex */
export function unknownMigration(migration: string): ManagerError {
  return new ManagerError(
    'unknown-migration',
    `nothing is known here of a migration ${migration.slice(0, 32)}`,
  );
}
