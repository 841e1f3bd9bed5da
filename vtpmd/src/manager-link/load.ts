import { randomBytes } from 'node:crypto';
import { setImmediate } from 'node:timers/promises';
import {
  bytesEqual,
  decode,
  type LoadGrant,
  ProtoError,
  type SignedTicket,
  ticketDigest,
  type Verb,
} from 'vtpm-proto';
import { VtpmdError } from '../error.js';
import type { LoadKeys } from './load-keys.js';
import type { ManagerLink } from './manager-link.js';

export interface Identity {
  readonly ticket: SignedTicket;
  /** From the ticket, 16 bytes each. */
  readonly vtpmUuid: Uint8Array;
  readonly vmRunId: Uint8Array;
  readonly verbs: readonly Verb[];
  /** The manager's box public key, 32 bytes. */
  readonly managerKey: Uint8Array;
  readonly startup: 'clear' | 'none';
  /** `vmm`: the TPM stays off until the VMM powers it on. */
  readonly power: 'on' | 'vmm';
  /** Its VMM brings it here from another host: the Load is what makes this its host. */
  readonly arrives: boolean;
  /** What a VMM chose before a run of its VM that was lost. */
  readonly vmm: { readonly bufferSize: number; readonly locality: number };
}

/** Reads the supervisor's `identity` message. @throws VtpmdError `protocol` */
export function readIdentity(message: Record<string, unknown>): Identity {
  const { ticket, managerKey, startup, power = 'on', arrives = false, vmm } = message;
  if (typeof ticket !== 'string' || typeof managerKey !== 'string' || !/^[0-9a-f]{64}$/i.test(managerKey)) {
    throw new VtpmdError('protocol', 'the identity has no ticket or manager key');
  }
  if (startup !== 'clear' && startup !== 'none') {
    throw new VtpmdError('protocol', 'the identity names no startup that is known');
  }
  if (power !== 'on' && power !== 'vmm') {
    throw new VtpmdError('protocol', 'the identity does not say who powers the TPM on');
  }
  if (typeof arrives !== 'boolean' || (arrives && power !== 'vmm')) {
    throw new VtpmdError('protocol', 'only what a VMM powers arrives with it');
  }
  try {
    const signed = decode('SignedTicket', Buffer.from(ticket, 'base64'));
    const { vtpmUuid, vmRunId, verbs } = decode('Ticket', signed.ticket);
    const key = Buffer.from(managerKey, 'hex');
    const names = { ticket: signed, vtpmUuid, vmRunId, verbs, managerKey: key };
    return { ...names, startup, power, arrives, vmm: readVmm(vmm) };
  } catch (cause) {
    throw new VtpmdError('protocol', 'the identity holds no readable ticket', { cause });
  }
}

function readVmm(vmm: unknown): Identity['vmm'] {
  const { bufferSize = 0, locality = 0 } = (vmm ?? {}) as { bufferSize?: unknown; locality?: unknown };
  if (Number.isInteger(bufferSize) && Number.isInteger(locality)) {
    return { bufferSize: Number(bufferSize), locality: Number(locality) };
  }
  throw new VtpmdError('protocol', 'what the identity says of the VMM are no numbers');
}

/**
 * Takes ownership of the vTPM on the ticket. The request and the answer are boxed between this process's key and the
 * manager's: nobody else can ask in its place or read the state. The caller wipes the keys.
 * @param referenceDigest of the reference that the VMM brought, where the vTPM arrives with that
 * @throws VtpmdError `refused`, `link-lost`, `protocol`
 */
export async function loadVtpm(
  link: ManagerLink,
  identity: Identity,
  keys: LoadKeys,
  libtpmsVersion: string,
  referenceDigest?: Uint8Array,
): Promise<LoadGrant> {
  const loadId = randomBytes(16);
  const claim = {
    ...{ ticketDigest: ticketDigest(identity.ticket), loadId, libtpmsVersion },
    ...(referenceDigest && { referenceDigest }),
  };
  const box = keys.boxFor(identity.managerKey);
  const answered = link.load({ ticket: identity.ticket, ...box.seal('LoadClaim', claim) });
  // Whoever awaits it below hears of it.
  answered.catch(() => undefined);
  // HTTP/2 writes at the end of a turn. What follows need not go before the request.
  await setImmediate();
  link.prepareSave();
  let grant: LoadGrant;
  try {
    grant = box.open('LoadGrant', await answered);
  } catch (cause) {
    if (!(cause instanceof ProtoError)) throw cause;
    throw new VtpmdError('protocol', `the manager's answer cannot be trusted: ${cause.message}`, { cause });
  }
  if (!bytesEqual(grant.loadId, loadId))
    throw new VtpmdError('protocol', 'the grant answers another request');
  if (grant.manufacture === grant.permanent.length > 0) {
    throw new VtpmdError(
      'protocol',
      'the grant must hold either a state or the permission to make a new TPM, and holds both or neither',
    );
  }
  return grant;
}
