import {
  bytesEqual,
  decode,
  expectLength,
  type Hello,
  ProtoError,
  type Session,
  type SessionCipher,
  uuidToText,
  type WorkerFrame,
} from 'vtpm-proto';
import { ManagerError } from '../error.js';
import { openFrame } from './live-session.js';
import type { Slot } from './slot.js';

/** The vTPM that the first frame of a stream names. @throws ManagerError `bad-request` */
export function readUuid(first: WorkerFrame): string {
  try {
    expectLength('session id', first.sessionId, 16);
    return uuidToText(first.vtpmUuid);
  } catch (error) {
    throw new ManagerError('bad-request', `${first.type}: ${(error as Error).message}`, { cause: error });
  }
}

/** @throws ManagerError `wrong-worker` where the frame is not from the session's worker; `bad-request` */
export function readHello(cipher: SessionCipher, first: WorkerFrame): Hello {
  try {
    return decode('Hello', openFrame(cipher, first));
  } catch (error) {
    if (error instanceof ManagerError && error.code === 'bad-request') {
      throw new ManagerError('wrong-worker', error.message, { cause: error });
    }
    if (!(error instanceof ProtoError)) throw error;
    throw new ManagerError('bad-request', `${first.type}: ${error.message}`, { cause: error });
  }
}

/** A recorded first frame is no use later: its link number is used up, or it knows less than the record. */
export function checkFirstFrame(slot: Slot, session: Session, first: WorkerFrame, hello: Hello): void {
  const newest = slot.newestLink;
  const isReplay =
    newest && bytesEqual(newest.sessionId, session.sessionId) && first.sequence <= newest.number;
  if (isReplay || hello.lastSent < session.lastSequence) {
    throw new ManagerError(
      'wrong-worker',
      `${first.type} of link ${first.sequence} was used before; count links up`,
    );
  }
  if (hello.lastAcknowledged > session.lastSequence) {
    throw new ManagerError(
      'rollback-detected',
      `the worker has an acknowledgement of save ${hello.lastAcknowledged}, the store ends at ${session.lastSequence}: the store is an older one`,
    );
  }
}
