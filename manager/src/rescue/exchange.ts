import {
  decode,
  encode,
  type PeerMessage,
  ProtoError,
  type Rescues,
  type SignedFencing,
  type SignedRescue,
} from 'vtpm-proto';
import type { AuditActor } from '../audit/index.js';
import { ManagerError } from '../error.js';
import type { PendingDeparture } from '../ownership/departure.js';
import type { PeerChannel } from '../peer/channel.js';

/** What both ends of an exchange need of this host. */
export interface RescueBook {
  /** What that peer is to hear, the oldest vTPMs first. @param hostId 32 bytes */
  held(hostId: Uint8Array): Promise<readonly SignedRescue[]>;
  /** Durable. @param vtpmUuid 16 bytes; one that is not held is nothing */
  heard(hostId: Uint8Array, vtpmUuid: Uint8Array): Promise<void>;
  /**
   * Ends what that peer says it has rescued.
   * @returns uuids of those that are ended for good now, or are not here
   */
  take(hostId: Uint8Array, rescues: readonly SignedRescue[]): Promise<Uint8Array[]>;
}

/** What has a departure go on here whose destination is gone for good. */
export interface TakesBack {
  /** @throws ManagerError `not-fenced`, `unknown-peer` */
  checkFenced(pending: PendingDeparture, fencing: SignedFencing): void;
  /** Durable, counted, and a notice for the destination. @throws ManagerError as `checkFenced`, `unknown-migration`, `busy` */
  takeBack(actor: AuditActor, pending: PendingDeparture, fencing: SignedFencing): Promise<void>;
}

/** In one message; each is about half a KiB. */
const MAX_NOTICES = 256;
/** Milliseconds: the other end writes tombstones, and its TPM counts them. */
const ANSWER_MS = 30_000;

/**
 * Who dialled tells what it holds and asks what the other one holds.
 * @returns whether both have told everything
 * @throws ManagerError of the channel, `bad-request`
 */
export async function tellRescues(channel: PeerChannel, book: RescueBook): Promise<boolean> {
  const { hostId } = channel.peer;
  const held = (await book.held(hostId)).slice(0, MAX_NOTICES);
  await channel.send(messageOf({ rescues: [...held], heard: [] }));
  const answer = rescuesIn(await channel.receive(ANSWER_MS));
  for (const uuid of answer.heard) await book.heard(hostId, uuid);
  if (answer.rescues.length > 0) {
    const heard = await book.take(hostId, answer.rescues);
    await channel.send(messageOf({ rescues: [], heard }));
  }
  return (await book.held(hostId)).length === 0 && answer.rescues.length < MAX_NOTICES;
}

/**
 * The same at the other end.
 * @param first the message of type RESCUED with which the channel began
 * @throws ManagerError of the channel, `bad-request`
 */
export async function answerRescues(
  channel: PeerChannel,
  first: PeerMessage,
  book: RescueBook,
): Promise<void> {
  const { hostId } = channel.peer;
  const heard = await book.take(hostId, rescuesIn(first).rescues);
  const held = (await book.held(hostId)).slice(0, MAX_NOTICES);
  await channel.send(messageOf({ rescues: [...held], heard }));
  if (held.length === 0) return;
  for (const uuid of rescuesIn(await channel.receive(ANSWER_MS)).heard) await book.heard(hostId, uuid);
}

function messageOf(rescues: Rescues): PeerMessage {
  return { type: 'RESCUED', payload: encode('Rescues', rescues) };
}

function rescuesIn({ type, payload }: PeerMessage): Rescues {
  if (type !== 'RESCUED') {
    throw new ManagerError(
      'bad-request',
      `the other host answers with ${type} where it says what it rescued`,
    );
  }
  let rescues: Rescues;
  try {
    rescues = decode('Rescues', payload);
  } catch (cause) {
    if (!(cause instanceof ProtoError)) throw cause;
    throw new ManagerError('bad-request', `what it rescued is not readable: ${cause.message}`, { cause });
  }
  if (rescues.rescues.length > MAX_NOTICES || rescues.heard.length > MAX_NOTICES) {
    throw new ManagerError('bad-request', `it says more than ${MAX_NOTICES} rescues at a time`);
  }
  return rescues;
}
