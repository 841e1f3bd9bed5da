import { createHash, sign } from 'node:crypto';
import { expectLength, uuidToText } from './bytes.js';
import { decode, encode } from './codec.js';
import { ProtoError } from './error.js';
import type { Delegation, SignedTicket, Ticket } from './generated/messages.js';
import { privateKeyFromSeed, rawBytesOf } from './raw-key.js';
import { checkFormat, checkSignature } from './signature.js';

/** Format number of tickets and delegations; a newer one is refused by name. */
export const IDENTITY_FORMAT = 1;

const TICKET_DOMAIN = Buffer.from('vtpm.v1 ticket\0');
const DELEGATION_DOMAIN = Buffer.from('vtpm.v1 delegation\0');

/**
 * An Ed25519 key (RFC 8032). The 32-byte seed is what tweetnacl's `sign.keyPair.fromSeed` takes; Node's own
 * Ed25519 signs and verifies the same format 300 times faster.
 */
export interface SigningKey {
  readonly publicKey: Buffer;
  sign(message: Uint8Array): Buffer;
}

export function signingKeyFromSeed(seed: Uint8Array): SigningKey {
  const key = privateKeyFromSeed(seed);
  return { publicKey: rawBytesOf(key), sign: (message) => sign(null, message, key) };
}

/** Lets `delegateKey` sign tickets for one vTPM. */
export function signDelegation(
  toolstackKey: SigningKey,
  delegation: Delegation,
): { delegation: Buffer; signature: Buffer } {
  const bytes = encode('Delegation', delegation);
  return { delegation: bytes, signature: toolstackKey.sign(Buffer.concat([DELEGATION_DOMAIN, bytes])) };
}

export function signTicket(
  delegateKey: SigningKey,
  ticket: Ticket,
  signed: { delegation: Uint8Array; signature: Uint8Array },
): SignedTicket {
  const bytes = encode('Ticket', ticket);
  return {
    ticket: bytes,
    signature: delegateKey.sign(Buffer.concat([TICKET_DOMAIN, bytes])),
    delegation: signed.delegation,
    delegationSignature: signed.signature,
  };
}

/** SHA-256 of the serialised ticket, 32 bytes: what a Load's claim must name. */
export function ticketDigest(signed: SignedTicket): Buffer {
  return createHash('sha256').update(signed.ticket).digest();
}

export interface VerifiedTicket {
  readonly ticket: Ticket;
  readonly delegation: Delegation;
  readonly vtpmUuid: string;
}

/**
 * Checks the signature chain and that ticket and delegation speak of the same vTPM, VM and verbs. What only the
 * manager knows (trusted toolstack keys, allowed images, epochs, time) is the caller's to check.
 * @throws ProtoError `malformed`, `forged` or `newer-format`
 */
export function verifyTicketChain(signed: SignedTicket): VerifiedTicket {
  const delegation = decode('Delegation', signed.delegation);
  const ticket = decode('Ticket', signed.ticket);
  checkFormat('ticket', ticket.format, IDENTITY_FORMAT);
  checkFormat('delegation', delegation.format, IDENTITY_FORMAT);
  for (const [what, bytes, length] of [
    ['manager id', ticket.managerId, 32],
    ['vTPM uuid', ticket.vtpmUuid, 16],
    ['VM uuid', ticket.vmUuid, 16],
    ['VM run id', ticket.vmRunId, 16],
    ['worker key', ticket.workerPublicKey, 32],
    ['image digest', ticket.imageDigest, 32],
    ['boot id', ticket.bootId, 16],
    ['toolstack key', delegation.toolstackKey, 32],
    ['delegate key', delegation.delegateKey, 32],
    ['delegation signature', signed.delegationSignature, 64],
    ['ticket signature', signed.signature, 64],
  ] as const) {
    expectLength(what, bytes, length);
  }
  checkSignature(
    'delegation',
    delegation.toolstackKey,
    DELEGATION_DOMAIN,
    signed.delegation,
    signed.delegationSignature,
  );
  checkSignature('ticket', delegation.delegateKey, TICKET_DOMAIN, signed.ticket, signed.signature);
  if (
    !Buffer.from(ticket.vtpmUuid).equals(delegation.vtpmUuid) ||
    !Buffer.from(ticket.vmUuid).equals(delegation.vmUuid)
  ) {
    throw new ProtoError('forged', 'the ticket names another vTPM or VM than its delegation');
  }
  for (const verb of ticket.verbs) {
    if (!delegation.verbs.includes(verb))
      throw new ProtoError('forged', `the delegation does not grant ${verb}`);
  }
  return { ticket, delegation, vtpmUuid: uuidToText(ticket.vtpmUuid) };
}
