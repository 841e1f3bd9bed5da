import type { Departure, MigrateOrder, SignedDecision } from 'vtpm-proto';
import { ManagerError } from '../error.js';
import type { TravellingState } from './travelling.js';

/** What a migration is prepared with. */
export interface DepartureFacts {
  readonly vtpmUuid: string;
  readonly vmUuid: Uint8Array;
  readonly vmRunId: Uint8Array;
  readonly epoch: bigint;
  readonly generation: bigint;
  readonly libtpmsVersion: string;
  /** Of all parts, in the clear; saves until the freeze may make it more. */
  readonly stateBytes: number;
  readonly isConnected: boolean;
  readonly isSuspended: boolean;
}

/** A vTPM that nobody runs here until its destination has said what it decided. */
export interface PendingDeparture {
  readonly vtpmUuid: string;
  /** Of the state that went. */
  readonly epoch: bigint;
  readonly generation: bigint;
  readonly departure: Departure;
}

/** How vTPMs leave. */
export class Departures {
  /**
   * Whether the vTPM may go as ordered; changes nothing. The order's signature is the caller's to check.
   * @throws ManagerError `unknown-vtpm`, `retired`, `moved`, `migrating`, `wrong-vm`, `stale-epoch`, `rollback-detected`,
   * `busy`
   */
  async check(_order: MigrateOrder): Promise<DepartureFacts> {
    throw unfinished();
  }

  /** Resolves when the VMM has taken the TPM out: a suspended state is durable. @throws ManagerError `migration-aborted` where `signal` came first */
  async awaitSuspend(_vtpmUuid: string, _signal: AbortSignal): Promise<void> {
    throw unfinished();
  }

  /**
   * Has the connected worker stop with all of its TPM saved.
   * @returns `none` where no worker is connected
   * @throws ManagerError `migration-aborted` where it went or did not answer in time: nothing has changed
   */
  async suspend(_vtpmUuid: string, _limitMs?: number): Promise<'frozen' | 'none'> {
    throw unfinished();
  }

  /** The worker goes on where it stopped. Before `depart` only. */
  async thawWorker(_vtpmUuid: string): Promise<void> {
    throw unfinished();
  }

  /**
   * From now on nobody runs it here: durable and counted by the TPM when it resolves. The record is the one that FROZEN
   * left, or it is not done.
   */
  async depart(
    _vtpmUuid: string,
    _departure: Omit<Departure, 'epoch' | 'generation'>,
  ): Promise<TravellingState> {
    throw unfinished();
  }

  /** It lives here again. Durable and counted. May be repeated. @throws ManagerError where it is no proof for this very departure */
  async abort(_vtpmUuid: string, _signed: SignedDecision): Promise<void> {
    throw unfinished();
  }

  /** It lives at the destination: key and state are dropped here. Durable and counted. May be repeated. */
  async commit(_vtpmUuid: string, _signed: SignedDecision): Promise<void> {
    throw unfinished();
  }

  async pending(): Promise<PendingDeparture[]> {
    throw unfinished();
  }
}

function unfinished(): ManagerError {
  return new ManagerError('internal', 'this is not built yet');
}
