import { createCipheriv, createDecipheriv, hkdfSync } from 'node:crypto';
import { expectLength } from './bytes.js';
import { ProtoError } from './error.js';
import type { ManagerFrame, ManagerFrameType, WorkerFrame, WorkerFrameType } from './generated/messages.js';
import { publicRandom } from './random.js';

/**
 * The cryptography of the Save stream: AES-256-GCM under one key per direction, derived from the session key of the
 * Load grant. Type, session, epoch and sequence are associated data, so that no frame can be moved, repeated under
 * another number or reflected. Nonces are random: a re-sent save has the same number but may be encrypted again.
 */
export interface SessionCipher {
  sealWorker(
    type: WorkerFrameType,
    sequence: bigint,
    payload: Uint8Array,
    vtpmUuid?: Uint8Array,
  ): WorkerFrame;
  /** @throws ProtoError `forged` */
  openWorker(frame: WorkerFrame): Buffer;
  sealManager(type: ManagerFrameType, sequence: bigint, payload: Uint8Array): ManagerFrame;
  /** @throws ProtoError `forged` */
  openManager(frame: ManagerFrame): Buffer;
}

const EMPTY = new Uint8Array(0);
const TYPE_CODE: Record<WorkerFrameType | ManagerFrameType, number> = {
  HELLO: 1,
  RESUME: 2,
  SAVE: 3,
  FROZEN: 4,
  ACK: 17,
  FENCED: 18,
  FREEZE: 19,
  THAW: 20,
};

export function sessionCipher(sessionKey: Uint8Array, sessionId: Uint8Array, epoch: bigint): SessionCipher {
  expectLength('session key', sessionKey, 32);
  expectLength('session id', sessionId, 16);
  const workerKey = deriveKey(sessionKey, sessionId, 'worker to manager');
  const managerKey = deriveKey(sessionKey, sessionId, 'manager to worker');
  const aad = (type: WorkerFrameType | ManagerFrameType, sequence: bigint): Buffer => {
    const out = Buffer.alloc(33);
    out.writeUInt8(TYPE_CODE[type], 0);
    out.set(sessionId, 1);
    out.writeBigUInt64BE(epoch, 17);
    out.writeBigUInt64BE(sequence, 25);
    return out;
  };
  return {
    sealWorker: (type, sequence, payload, vtpmUuid) => ({
      type,
      sequence,
      vtpmUuid: vtpmUuid ?? EMPTY,
      sessionId: vtpmUuid ? sessionId : EMPTY,
      ...seal(workerKey, aad(type, sequence), payload),
    }),
    openWorker: (frame) => open(workerKey, aad(frame.type, frame.sequence), frame, frame.type),
    sealManager: (type, sequence, payload) => ({
      type,
      sequence,
      ...seal(managerKey, aad(type, sequence), payload),
    }),
    openManager: (frame) => open(managerKey, aad(frame.type, frame.sequence), frame, frame.type),
  };
}

function deriveKey(sessionKey: Uint8Array, sessionId: Uint8Array, direction: string): Buffer {
  return Buffer.from(hkdfSync('sha256', sessionKey, sessionId, `vtpm.v1 session ${direction}`, 32));
}

function seal(key: Uint8Array, aad: Uint8Array, payload: Uint8Array): { nonce: Buffer; sealed: Buffer } {
  const nonce = publicRandom(12);
  const cipher = createCipheriv('aes-256-gcm', key, nonce);
  cipher.setAAD(aad);
  return { nonce, sealed: Buffer.concat([cipher.update(payload), cipher.final(), cipher.getAuthTag()]) };
}

function open(
  key: Uint8Array,
  aad: Uint8Array,
  frame: { nonce: Uint8Array; sealed: Uint8Array },
  type: string,
): Buffer {
  expectLength('nonce', frame.nonce, 12);
  if (frame.sealed.length < 16) throw new ProtoError('malformed', `${type}: the sealed payload has no tag`);
  const body = frame.sealed.subarray(0, -16);
  const decipher = createDecipheriv('aes-256-gcm', key, frame.nonce);
  decipher.setAAD(aad);
  decipher.setAuthTag(frame.sealed.subarray(-16));
  try {
    // GCM has given out everything with `update`.
    const payload = decipher.update(body);
    decipher.final();
    return payload;
  } catch (cause) {
    throw new ProtoError('forged', `${type}: the frame is not of this session, epoch and sequence`, cause);
  }
}
