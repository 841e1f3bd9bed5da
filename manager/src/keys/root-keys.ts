import { expectLength } from 'vtpm-proto';
import { hkdf, wipe } from './secret.js';

/** What is derived from one generation of the root key. Nothing under it can be read once that generation is erased. */
export interface RootKeys {
  /** Number of the generation, from 1. */
  readonly keyId: number;
  /** 16 bytes */
  readonly storeId: Buffer;
  /** Wraps the data keys of the vTPMs. */
  readonly storeKey: Buffer;
  readonly recordMacKey: Buffer;
  readonly trustMacKey: Buffer;
  readonly anchorKey: Buffer;
  readonly auditKey: Buffer;
  /** Authenticates the enrolment file. */
  readonly enrolmentMacKey: Buffer;
  /** Seals the secrets of the installation. */
  readonly keyringKey: Buffer;
  wipe(): void;
}

const NO_SALT = new Uint8Array(0);

/** @param rootKey 32 bytes; the caller wipes it @param storeId 16 bytes @param keyId generation of the root key */
export function deriveRootKeys(rootKey: Uint8Array, storeId: Uint8Array, keyId: number): RootKeys {
  expectLength('root key', rootKey, 32);
  expectLength('store id', storeId, 16);
  const ofStore = (purpose: string): Buffer => hkdf(rootKey, storeId, `vtpm.v1 ${purpose}`);
  const keys = {
    storeKey: ofStore('store key'),
    recordMacKey: ofStore('record mac'),
    trustMacKey: ofStore('trust mac'),
    anchorKey: ofStore('anchor'),
    auditKey: ofStore('audit'),
    keyringKey: ofStore('keyring'),
    // It says which store there is.
    enrolmentMacKey: hkdf(rootKey, NO_SALT, 'vtpm.v1 enrolment mac'),
  };
  return { ...keys, keyId, storeId: Buffer.from(storeId), wipe: () => wipe(...Object.values(keys)) };
}
