import { randomFillSync } from 'node:crypto';
import { ManagerError } from '../error.js';
import { aeadOpen, aeadSeal, NONCE_BYTES, TAG_BYTES } from './aead.js';
import type { RootKeys } from './root-keys.js';
import { hkdf, secretBuffer, wipe } from './secret.js';

/**
 * Secrets that stay the same over the rotation of the root key, because others hold on to what comes of them: the
 * supervisor to the manager's identity, workers to their sessions, the TPM to the authorisation of the anchor's counter.
 * 32 random bytes each, made once, and kept in the enrolment file under the root key.
 */
export interface InstallationSecrets {
  readonly identity: Buffer;
  readonly session: Buffer;
  readonly anchor: Buffer;
}

const SECRET_BYTES = 32;
const TOTAL_BYTES = 3 * SECRET_BYTES;

/** The caller wipes them with `wipeSecrets`. */
export function newInstallationSecrets(): InstallationSecrets {
  return split(randomFillSync(secretBuffer(TOTAL_BYTES)));
}

/** Authorises the anchor's counter in the TPM, 32 bytes; the caller wipes it. @param storeId 16 bytes */
export function anchorAuthOf({ anchor }: InstallationSecrets, storeId: Uint8Array): Buffer {
  return hkdf(anchor, storeId, 'vtpm.v1 anchor counter');
}

/** Nonce, ciphertext and tag. */
export function sealInstallationSecrets(keys: RootKeys, secrets: InstallationSecrets): Buffer {
  const plain = secretBuffer(TOTAL_BYTES);
  plain.set(secrets.identity, 0);
  plain.set(secrets.session, SECRET_BYTES);
  plain.set(secrets.anchor, 2 * SECRET_BYTES);
  try {
    const { nonce, sealed } = aeadSeal(keys.keyringKey, associatedData(keys), plain);
    return Buffer.concat([nonce, sealed]);
  } finally {
    wipe(plain);
  }
}

/** The caller wipes them with `wipeSecrets`. @throws ManagerError `store-corrupt` */
export function openInstallationSecrets(keys: RootKeys, sealed: Uint8Array): InstallationSecrets {
  if (sealed.length !== NONCE_BYTES + TOTAL_BYTES + TAG_BYTES) {
    throw new ManagerError('store-corrupt', "the enrolment's keyring has the wrong length");
  }
  const parts = { nonce: sealed.subarray(0, NONCE_BYTES), sealed: sealed.subarray(NONCE_BYTES) };
  return split(aeadOpen(keys.keyringKey, associatedData(keys), parts, "the enrolment's keyring"));
}

export function wipeSecrets(secrets: InstallationSecrets): void {
  wipe(secrets.identity, secrets.session, secrets.anchor);
}

/** "vtpm.v1 keyring", generation (u32, big-endian), store id. */
function associatedData({ keyId, storeId }: RootKeys): Buffer {
  const number = Buffer.alloc(4);
  number.writeUInt32BE(keyId);
  return Buffer.concat([Buffer.from('vtpm.v1 keyring'), number, storeId]);
}

function split(all: Buffer): InstallationSecrets {
  const part = (index: number): Buffer => all.subarray(index * SECRET_BYTES, (index + 1) * SECRET_BYTES);
  return { identity: part(0), session: part(1), anchor: part(2) };
}
