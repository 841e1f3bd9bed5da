import { wipe } from './bytes.js';
import { encode, tpm2b } from './codec.js';
import { encapsulate } from './crypto.js';
import { protect } from './protect.js';
import type { Public } from './structures.js';

/** What ActivateCredential takes. */
export interface Credential {
  readonly credentialBlob: Buffer;
  readonly secret: Buffer;
}

/**
 * MakeCredential without a TPM (Part 1, "Credential Protection"): only the TPM that holds both `key` and the object
 * with that Name
 * gives `credential` out.
 * @param key a storage key, usually an endorsement key that a certificate vouches for
 * @param credential at most as long as the digest of the key's nameAlg
 */
export function makeCredential(key: Public, objectName: Buffer, credential: Buffer): Credential {
  const { secret, encrypted } = encapsulate(key, 'IDENTITY');
  const plain = encode(tpm2b, credential);
  try {
    return { credentialBlob: protect(key, secret, objectName, plain), secret: encrypted };
  } finally {
    wipe(secret, plain);
  }
}
