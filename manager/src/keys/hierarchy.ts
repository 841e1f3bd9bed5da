import { type BoxKeyPair, boxKeyPair, expectLength } from 'vtpm-proto';
import { hkdf, wipe } from './secret.js';

/** Number of the store key in use; records name it so that it can be rotated. */
export const STORE_KEY_ID = 1;

/** Everything the manager derives from the root key. It lives in memory only, as long as the manager is unlocked. */
export interface KeyHierarchy {
  readonly storeId: Buffer;
  /** Wraps the data keys of the vTPMs. */
  readonly storeKey: Buffer;
  readonly recordMacKey: Buffer;
  readonly trustMacKey: Buffer;
  readonly anchorKey: Buffer;
  /** Authenticates the enrolment file. */
  readonly enrolmentMacKey: Buffer;
  /** The manager's identity: Load requests are boxed to it. */
  readonly identity: BoxKeyPair;
  /** Key of one session. The same inputs give the same key, so that a restarted manager goes on with it. 32 bytes. */
  sessionKey(session: SessionNames): Buffer;
  wipe(): void;
}

export interface SessionNames {
  /** 16 bytes */
  readonly sessionId: Uint8Array;
  /** 16 bytes */
  readonly vtpmUuid: Uint8Array;
  readonly epoch: bigint;
  /** 32 bytes */
  readonly workerKey: Uint8Array;
}

const NO_SALT = new Uint8Array(0);

/** @param rootKey 32 bytes; the caller wipes it @param storeId 16 bytes */
export function deriveKeys(rootKey: Uint8Array, storeId: Uint8Array): KeyHierarchy {
  expectLength('root key', rootKey, 32);
  expectLength('store id', storeId, 16);
  const ofStore = (purpose: string): Buffer => hkdf(rootKey, storeId, `vtpm.v1 ${purpose}`);
  const storeKey = ofStore('store key');
  const recordMacKey = ofStore('record mac');
  const trustMacKey = ofStore('trust mac');
  const anchorKey = ofStore('anchor');
  const sessionRoot = ofStore('session root');
  // These two outlive a store.
  const enrolmentMacKey = hkdf(rootKey, NO_SALT, 'vtpm.v1 enrolment mac');
  const identitySecret = hkdf(rootKey, NO_SALT, 'vtpm.v1 manager identity');
  const identity = boxKeyPair(identitySecret);
  // The pair has its own copy.
  wipe(identitySecret);
  return {
    storeId: Buffer.from(storeId),
    storeKey,
    recordMacKey,
    trustMacKey,
    anchorKey,
    enrolmentMacKey,
    identity,
    sessionKey: (session) => hkdf(sessionRoot, session.sessionId, sessionInfo(session)),
    wipe: () =>
      wipe(storeKey, recordMacKey, trustMacKey, anchorKey, sessionRoot, enrolmentMacKey, identity.secretKey),
  };
}

/** "vtpm.v1 session", uuid, epoch (u64, big-endian), worker key: every part has a fixed length. */
function sessionInfo({ sessionId, vtpmUuid, epoch, workerKey }: SessionNames): Buffer {
  expectLength('session id', sessionId, 16);
  expectLength('vTPM uuid', vtpmUuid, 16);
  expectLength('worker key', workerKey, 32);
  const number = Buffer.alloc(8);
  number.writeBigUInt64BE(epoch);
  return Buffer.concat([Buffer.from('vtpm.v1 session'), vtpmUuid, number, workerKey]);
}
