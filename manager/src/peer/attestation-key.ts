import { timingSafeEqual } from 'node:crypto';
import {
  attestationKeyTemplate,
  isMadeFrom,
  makeCredential,
  type Public,
  publicKeyObject,
  TpmError,
} from 'tpm2-ts-bindings';
import { type Challenge, publicRandom } from 'vtpm-proto';
import { ManagerError } from '../error.js';
import { readPublicKey } from './public-area.js';
import { refusing } from './refusing.js';

const { refused, asRefusal } = refusing('peer-ak', 'attestation key');

/** Bytes of the secret in a challenge. */
const ANSWER_BYTES = 32;
const AGAIN = 'Take vtpmctl peer identity of that host here once more';

/** A challenge, and what comes back from the TPM that it is for. */
export interface MadeChallenge {
  readonly challenge: Challenge;
  /** 32 bytes, for `checkAnswer`. The caller wipes it. */
  readonly answer: Buffer;
}

/**
 * Accepts another host's attestation key: one that signs nothing but what its TPM says of itself, and that is in no other
 * TPM. Both hold only for a key that is in a TPM: see `makeChallenge`.
 * @param bytes TPMT_PUBLIC
 * @throws ManagerError `peer-ak`
 */
export function acceptAttestationKey(bytes: Uint8Array): Public {
  const area = asRefusal(() => readPublicKey(bytes, 'attestation key')).publicArea;
  if (!isMadeFrom(area, attestationKeyTemplate())) {
    throw refused(
      'is not of the one kind that is taken: ECDSA on P-256 with SHA-256, restricted, sign, fixedTPM, fixedParent, ' +
        `sensitiveDataOrigin, userWithAuth and noDA, without a policy. ${AGAIN}`,
    );
  }
  asRefusal(() => publicKeyObject(area.value));
  return area.value;
}

/**
 * A secret that only a TPM which holds both keys gives out (Part 1, "Credential Protection").
 * @param endorsementKey TPMT_PUBLIC of the one that was accepted
 * @param attestationKey TPMT_PUBLIC of the one that is to be in the same TPM
 * @throws ManagerError `peer-ek`, `peer-ak`
 */
export function makeChallenge(endorsementKey: Uint8Array, attestationKey: Uint8Array): MadeChallenge {
  const { name } = asRefusal(() => readPublicKey(attestationKey, 'attestation key'));
  const answer = publicRandom(ANSWER_BYTES);
  try {
    const key = readPublicKey(endorsementKey, 'endorsement key');
    return { challenge: makeCredential(key.publicArea.value, name, answer), answer };
  } catch (cause) {
    if (!(cause instanceof TpmError)) throw cause;
    throw new ManagerError(
      'peer-ek',
      `no challenge can be made for the endorsement key of the other host: ${cause.message}. ${AGAIN}`,
      { cause },
    );
  }
}

/**
 * Checks what came back for a challenge. From then on the attestation key is known to be in the TPM of the endorsement
 * key, for good.
 * @throws ManagerError `peer-ak`
 */
export function checkAnswer({ answer }: MadeChallenge, received: Uint8Array): void {
  if (received.length === answer.length && timingSafeEqual(received, answer)) return;
  throw refused(
    'was not shown to be in the TPM whose endorsement key was enrolled: it did not answer the challenge. ' +
      AGAIN,
  );
}
