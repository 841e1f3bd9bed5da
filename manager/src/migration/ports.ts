import type { Logger } from 'vtpm-common';
import type { Challenge, Evidence, ImportKeyOffer, Peer } from 'vtpm-proto';
import type { AuditEvent } from '../audit/index.js';
import type { Arrivals as AllArrivals } from '../ownership/arrival.js';
import type { Departures as AllDepartures } from '../ownership/departure.js';
import type { VtpmEvents } from '../ownership/events.js';
import type { MadeChallenge } from '../peer/attestation-key.js';
import type { PeerChannel } from '../peer/channel.js';
import type { PlatformFacts } from '../peer/evidence.js';
import type { RescueBook, TakesBack } from '../rescue/exchange.js';
import type { ImportKey } from '../root-tpm/import-key.js';
import type { OrderEnvironment } from './order-check.js';

/** The records of vTPMs that leave. */
export type Departures = Pick<
  AllDepartures,
  | 'check'
  | 'announce'
  | 'renounce'
  | 'awaitSuspend'
  | 'suspend'
  | 'thawWorker'
  | 'depart'
  | 'abort'
  | 'commit'
  | 'pending'
>;

/** The records of vTPMs that come. Each migration id is decided once. */
export type Arrivals = Pick<
  AllArrivals,
  'check' | 'expect' | 'announce' | 'commit' | 'abort' | 'decisionOf' | 'settled' | 'unsettled'
>;

/** What this host's chip says of it, and what the chips of others are held against. */
export interface Attestor {
  /** @param qualifying 32 bytes that the key's certificate is over */
  makeImportKey(qualifying: Uint8Array): Promise<ImportKey>;
  /** @param qualifying 32 bytes */
  evidence(qualifying: Uint8Array): Promise<Omit<Evidence, 'challengeAnswer'>>;
  /** @throws ManagerError `peer-ek` */
  answer(challenge: Challenge): Promise<Uint8Array>;
  /** Undefined where the peer's AK was proven before. */
  challenge(peer: Peer): MadeChallenge | undefined;
  /** Holds the answer against the challenge, and remembers that the AK is in the EK's TPM. @throws ManagerError `peer-ak` */
  prove(peer: Peer, made: MadeChallenge, answer: Uint8Array): Promise<void>;
  /** @throws ManagerError `peer-unattested`, `peer-platform`, `peer-ak`, `approval-stale` */
  verify(peer: Peer, evidence: Evidence, qualifying: Uint8Array): PlatformFacts;
  /**
   * Of the destination: the key is in its chip, and bound to what the evidence shows.
   * @returns a point for the chip, and the secret that it makes of it, 32 bytes; the caller wipes it
   * @throws ManagerError `peer-import-key`, `peer-restarted`
   */
  wrap(
    peer: Peer,
    offer: ImportKeyOffer,
    qualifying: Uint8Array,
    facts: PlatformFacts,
  ): { readonly point: Uint8Array; readonly secret: Buffer };
}

/** This host, and how it reaches others. */
export interface Host {
  readonly hostId: Uint8Array;
  /** Empty where it is not known. */
  libtpmsVersion(): string;
  /** @throws ManagerError `unknown-peer` */
  peer(hostId: Uint8Array): Peer;
  /** @throws ManagerError `peer-unreachable` where nobody proved to be it, and nothing else does; `peer-closed` */
  dial(peer: Peer): Promise<PeerChannel>;
  /** @throws ManagerError `store-full` */
  checkRoom(): void;
  /** The newest lines of the audit log about a vTPM. */
  auditTail(vtpmUuid: string): Promise<string[]>;
}

/** What migrations are made of. */
export interface MigrationParts {
  readonly host: Host;
  readonly departures: Departures;
  readonly arrivals: Arrivals;
  /** What was rescued from other hosts, and from here. */
  readonly rescues: RescueBook & TakesBack;
  readonly attestor: Attestor;
  readonly orders: OrderEnvironment;
  readonly events: VtpmEvents;
  audit(event: AuditEvent): Promise<unknown>;
  readonly log: Logger;
  /** For tests: other pauses between two questions to another host. */
  readonly pausesMs?: readonly number[] | undefined;
}
