import type { MigrationDecision, MigrationHello, Peer, SignedDecision } from 'vtpm-proto';
import { ManagerError } from '../error.js';
import type { TravellingState } from './travelling.js';

/** A vTPM whose place is held until its state is here. */
export interface Expected {
  readonly migrationId: Uint8Array;
  readonly vtpmUuid: string;
  /**
   * Resolves when a worker with a good ticket for it waits. Rejects when the place is given up.
   * Never resolves in mode OFFLINE, and need not in mode VMM.
   */
  readonly loadWaiting: Promise<{ readonly libtpmsVersion: string }>;
  /** Gives the place up; Loads that wait get the error. What was decided stays, otherwise it can only be an ABORT now. */
  release(error: ManagerError): void;
}

/** What a source asks about. */
export type InquiryFacts = Pick<
  MigrationDecision,
  'migrationId' | 'source' | 'vtpmUuid' | 'epoch' | 'generation'
>;

/** Committed here, of which the source has not said yet that its tombstone is written. */
export interface UnsettledArrival {
  readonly vtpmUuid: string;
  readonly migrationId: Uint8Array;
  readonly source: Uint8Array;
}

/** How vTPMs come, and what this host decided of it. */
export class Arrivals {
  /**
   * Whether there is a place for it; changes nothing.
   * @throws ManagerError `busy`, `retired`, `migrating`, `migration-refused`, `rollback-detected`, `store-full`
   */
  async check(_hello: MigrationHello, _peer: Pick<Peer, 'hostId'>): Promise<void> {
    throw unfinished();
  }

  /** Holds its place: Loads with a ticket for it wait. From now on it is an ABORT unless it is committed, also after a restart. */
  async expect(_hello: MigrationHello, _peer: Pick<Peer, 'hostId'>): Promise<Expected> {
    throw unfinished();
  }

  /**
   * THE decision: the record, with the session of the Load that waits in it, in one write that the TPM counts. In mode VMM it
   * waits for the Load that shows the reference.
   * @throws ManagerError `migration-aborted` where the place was given up or it was aborted before. After `store-full` nothing
   * is decided, and an abort works
   */
  async commit(_expected: Expected, _state: TravellingState): Promise<SignedDecision> {
    throw unfinished();
  }

  /** Ends what is under way of it. @returns ABORT, durable and counted; or the COMMIT where that was decided before */
  async abort(_facts: InquiryFacts): Promise<SignedDecision> {
    throw unfinished();
  }

  /** undefined where nothing is decided, or only `abort` can say it. */
  async decisionOf(_migrationId: Uint8Array): Promise<SignedDecision | undefined> {
    throw unfinished();
  }

  /** The source's tombstone, or its thaw, is durable: nobody will ask again. */
  async settled(_migrationId: Uint8Array): Promise<void> {
    throw unfinished();
  }

  unsettled(): UnsettledArrival[] {
    throw unfinished();
  }
}

function unfinished(): ManagerError {
  return new ManagerError('internal', 'this is not built yet');
}
