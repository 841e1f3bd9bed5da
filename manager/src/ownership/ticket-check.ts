import { randomBytes } from 'node:crypto';
import {
  AgreedBox,
  type BoxKeyPair,
  bytesEqual,
  type LoadClaim,
  type LoadRequest,
  ProtoError,
  type RecordHeader,
  type Session,
  type Ticket,
  ticketDigest,
  type VerifiedTicket,
  verifyTicketChain,
} from 'vtpm-proto';
import { ManagerError } from '../error.js';
import type { LoadFacts } from '../records/index.js';
import type { TrustStore } from '../trust/trust-configuration.js';
import { verbsOfSaves } from './state-use.js';

/** Both ends read the same clock of the same host; the skew allows for a supervisor in another time namespace. */
const CLOCK_SKEW_MS = 60_000n;
const MAX_VERSION_LENGTH = 64;

/** What the ticket is held against. */
export interface TicketEnvironment {
  readonly identity: BoxKeyPair;
  readonly trust: Pick<TrustStore, 'isToolstackKeyTrusted' | 'isImageAllowed'>;
  /** 16 bytes */
  bootId(): Uint8Array;
  /** CLOCK_MONOTONIC */
  monotonicMs(): bigint;
}

/** A Load whose ticket, worker and time are in order; the vTPM's record has not been looked at. */
export interface CheckedLoad {
  readonly ticket: Ticket;
  readonly vtpmUuid: string;
  readonly claim: LoadClaim;
  /** Between the worker on the ticket and this manager; wiped by whoever asked for the check. */
  readonly box: AgreedBox;
}

/**
 * Everything about a Load that does not need the vTPM's record, so that a ticket that is no good never holds the vTPM.
 * Who signed comes first: nothing of an unsigned ticket is believed, not even its time.
 * @param admit called when that is known, with the vTPM's uuid; what it throws refuses the Load
 * @throws ManagerError `bad-request`, `newer-format`, `ticket-forged`, `unknown-toolstack-key`, `wrong-manager`,
 * `ticket-expired`, `image-not-allowed`, `wrong-worker`
 */
export function checkTicket(
  request: LoadRequest,
  environment: TicketEnvironment,
  admit: (vtpmUuid: string) => void,
): CheckedLoad {
  const { ticket, delegation, vtpmUuid } = verifyChain(request);
  if (!environment.trust.isToolstackKeyTrusted(delegation.toolstackKey, ticket.vtpmUuid)) {
    throw new ManagerError(
      'unknown-toolstack-key',
      `the ticket for vTPM ${vtpmUuid} comes from a toolstack key this manager does not trust; use the toolstack that was named at init`,
    );
  }
  admit(vtpmUuid);
  if (!bytesEqual(ticket.managerId, environment.identity.publicKey)) {
    throw new ManagerError('wrong-manager', `the ticket for vTPM ${vtpmUuid} is for another manager`);
  }
  checkTime(ticket, vtpmUuid, environment);
  if (!environment.trust.isImageAllowed(ticket.imageDigest)) {
    const digest = Buffer.from(ticket.imageDigest).toString('hex');
    throw new ManagerError(
      'image-not-allowed',
      `the worker image ${digest} is not allowed; check it, then run: vtpmctl image allow ${digest}`,
    );
  }
  return { ticket, vtpmUuid, ...openClaim(request, ticket, environment) };
}

/** What a Load is held against. */
export type LoadableHeader = Pick<RecordHeader, 'kind' | 'vmUuid' | 'epoch' | 'generation' | 'departure'>;

/** Whether the vTPM is at home. @throws ManagerError `retired`, `moved`, `migrating` */
export function checkHere(
  vtpmUuid: string,
  { kind, departure }: Pick<RecordHeader, 'kind' | 'departure'>,
): void {
  if (kind === 'RETIRED') {
    throw new ManagerError('retired', `vTPM ${vtpmUuid} was retired for good; create a new one`);
  }
  const where = departure ? Buffer.from(departure.destination).toString('hex') : 'unknown';
  if (kind === 'MOVED') {
    throw new ManagerError(
      'moved',
      `vTPM ${vtpmUuid} lives on another host, whose id is ${where}; it comes back by a migration from there`,
    );
  }
  if (departure) {
    throw new ManagerError(
      'migrating',
      `vTPM ${vtpmUuid} is on its way to the host whose id is ${where}, and nobody runs it until that host has said what ` +
        `it decided; where it does not come to know by itself, run: vtpmctl migrate resolve ${vtpmUuid}`,
    );
  }
}

/**
 * What the vTPM's record says to a Load.
 * @returns `manufacture` where the worker makes a new TPM, `cold` where it may power one on, else `resume`
 * @throws ManagerError `retired`, `moved`, `migrating`, `wrong-vm`, `stale-epoch`, `verb-missing`, `already-manufactured`
 */
export function checkAgainstRecord(
  { ticket, vtpmUuid }: CheckedLoad,
  header: LoadableHeader | undefined,
): 'manufacture' | 'cold' | 'resume' {
  if (header) checkHere(vtpmUuid, header);
  if (header && !bytesEqual(header.vmUuid, ticket.vmUuid)) {
    throw new ManagerError('wrong-vm', `vTPM ${vtpmUuid} belongs to another VM than the ticket names`);
  }
  const epoch = header?.epoch ?? 0n;
  if (ticket.expectedEpoch !== epoch) {
    throw new ManagerError(
      'stale-epoch',
      `vTPM ${vtpmUuid} is at epoch ${epoch}, the ticket expects ${ticket.expectedEpoch}; the ticket was used or is old, sign a new one`,
    );
  }
  const has = (verb: Ticket['verbs'][number]): boolean => ticket.verbs.includes(verb);
  if ((header?.generation ?? 0n) === 0n) {
    if (has('MANUFACTURE')) return 'manufacture';
    throw new ManagerError(
      'verb-missing',
      `vTPM ${vtpmUuid} has no saved state and the ticket does not have the verb manufacture`,
    );
  }
  if (has('COLD')) return 'cold';
  if (has('RESUME')) return 'resume';
  if (has('MANUFACTURE')) {
    throw new ManagerError(
      'already-manufactured',
      `vTPM ${vtpmUuid} has saved state and is never manufactured again; ask for the verb cold`,
    );
  }
  throw new ManagerError('verb-missing', `the ticket for vTPM ${vtpmUuid} has neither verb cold nor resume`);
}

/** What a Load that is in order brings into the record: a session of its own. */
export function loadFactsOf({ ticket, claim }: CheckedLoad): LoadFacts {
  const session: Session = {
    sessionId: randomBytes(16),
    workerKey: Buffer.from(ticket.workerPublicKey),
    lastSequence: 0n,
    lastDigest: new Uint8Array(0),
    imageDigest: Buffer.from(ticket.imageDigest),
    isolation: ticket.isolation,
    verbs: verbsOfSaves(ticket.verbs),
  };
  return {
    vmRunId: ticket.vmRunId,
    bootId: ticket.bootId,
    session,
    libtpmsVersion: claim.libtpmsVersion,
    keepsVolatile: ticket.verbs.includes('RESUME'),
  };
}

const TICKET_REFUSAL = {
  malformed: 'bad-request',
  forged: 'ticket-forged',
  'newer-format': 'newer-format',
} as const;

function verifyChain(request: LoadRequest): VerifiedTicket {
  if (!request.ticket) throw new ManagerError('bad-request', 'the Load has no ticket');
  try {
    return verifyTicketChain(request.ticket);
  } catch (error) {
    if (!(error instanceof ProtoError)) throw error;
    throw new ManagerError(TICKET_REFUSAL[error.code], `the ticket is refused: ${error.message}`, {
      cause: error,
    });
  }
}

function checkTime(ticket: Ticket, vtpmUuid: string, environment: TicketEnvironment): void {
  if (!bytesEqual(ticket.bootId, environment.bootId())) {
    throw new ManagerError(
      'ticket-expired',
      `the ticket for vTPM ${vtpmUuid} is of another boot of the host`,
    );
  }
  if (ticket.expiresAtMonotonicMs + CLOCK_SKEW_MS < environment.monotonicMs()) {
    throw new ManagerError('ticket-expired', `the ticket for vTPM ${vtpmUuid} has expired; sign a new one`);
  }
}

/** The claim proves that the caller has the secret half of the worker key, and means this very ticket. */
function openClaim(
  request: LoadRequest,
  ticket: Ticket,
  { identity }: TicketEnvironment,
): Pick<CheckedLoad, 'claim' | 'box'> {
  let box: AgreedBox | undefined;
  try {
    box = new AgreedBox(ticket.workerPublicKey, identity);
    const claim = box.open('LoadClaim', request);
    checkClaim(claim, request);
    return { claim, box };
  } catch (error) {
    box?.wipe();
    if (!(error instanceof ProtoError)) throw error;
    const code = error.code === 'forged' ? 'wrong-worker' : 'bad-request';
    throw new ManagerError(code, `the Load is not from the worker on the ticket: ${error.message}`, {
      cause: error,
    });
  }
}

function checkClaim(claim: LoadClaim, request: LoadRequest): void {
  if (!request.ticket || !bytesEqual(claim.ticketDigest, ticketDigest(request.ticket))) {
    throw new ManagerError('wrong-worker', 'the Load was made for another ticket');
  }
  if (claim.loadId.length !== 16 || claim.libtpmsVersion.length > MAX_VERSION_LENGTH) {
    throw new ManagerError('bad-request', 'the Load claim has a load id or version of the wrong length');
  }
}
