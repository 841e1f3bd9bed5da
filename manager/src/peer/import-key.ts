import { diffieHellman, generateKeyPairSync } from 'node:crypto';
import {
  Alg,
  agreementKeyTemplate,
  Curve,
  concat,
  encode,
  isMadeFrom,
  nameOf,
  type ObjectEntity,
  publicKeyObject,
  Rh,
  TpmError,
  tpmsEccPoint,
  verifyCertify,
} from 'tpm2-ts-bindings';
import type { ImportKeyOffer, Peer } from 'vtpm-proto';
import { ManagerError } from '../error.js';
import { fixedPolicy } from '../root-tpm/generation.js';
import { importSecret } from '../root-tpm/import-secret.js';
import type { PlatformFacts } from './evidence.js';
import { readPublicKey } from './public-area.js';
import { attested, bootOf, oneSelection, requireSameBoot, statementBy } from './statement.js';

/** The source's side of the destination's import key. */

/** Handles of hierarchies are their Names (Part 1, "Names"). */
const NULL_HIERARCHY = Buffer.alloc(4);
NULL_HIERARCHY.writeUInt32BE(Rh.NULL);

/**
 * Checks that a key is in the destination's TPM, for one use, under the platform that was approved and no other.
 * @param offer certified over `transcript`, 32 bytes: that of the moment before the key was offered
 * @param facts of the destination's evidence; the policy is computed from them, not taken from the offer
 * @throws ManagerError `peer-import-key`, `peer-unattested`, `peer-restarted`, `peer-ak`
 */
export function verifyImportKey(
  peer: Pick<Peer, 'name' | 'attestationKey'>,
  offer: ImportKeyOffer,
  transcript: Uint8Array,
  facts: PlatformFacts,
): void {
  const { publicArea, name } = readKey(peer, offer.publicArea);
  const selection = attested(peer, () => oneSelection(offer.pcrSelection));
  if (selection !== facts.pcrSelection) {
    throw refused(peer, `is bound to the registers ${selection}, its quote is over ${facts.pcrSelection}`);
  }
  const policy = fixedPolicy(facts.pcrSelection, facts.pcrs);
  if (!isMadeFrom(publicArea, agreementKeyTemplate(policy))) {
    throw refused(
      peer,
      'is not as it has to be: P-256 for ECDH, fixedTPM, stClear, fixedParent, sensitiveDataOrigin, noDA and decrypt, ' +
        'usable only while the registers have the values of its quote',
    );
  }
  const { key, signature } = statementBy(peer, offer.certifySignature);
  const certified = attested(peer, () =>
    verifyCertify(Buffer.from(offer.certifyInfo), signature, { key, nonce: transcript, name }),
  );
  // Of another hierarchy it could be made once more after a reset, for who recorded what was sent.
  if (!certified.attested.qualifiedName.equals(inNullHierarchy(name))) {
    throw refused(peer, 'is not in the null hierarchy, which a reset of the TPM empties');
  }
  requireSameBoot(peer, facts.boot, bootOf(certified));
}

/** The Qualified Name of a primary object there (Part 1, "Qualified Name"). */
function inNullHierarchy(name: Buffer): Buffer {
  return nameOf(Alg.SHA256, concat(NULL_HIERARCHY, name));
}

/**
 * A secret for the key: only the TPM that holds it gets the same out of the point (`ImportKey.unwrap`).
 * @param importKey TPMT_PUBLIC of one that `verifyImportKey` took
 * @returns TPMS_ECC_POINT of a key that is used once, and 32 bytes that the caller wipes
 * @throws ManagerError `peer-import-key`
 */
export function sealSecret(importKey: Uint8Array): { readonly point: Buffer; readonly secret: Buffer } {
  const { publicArea, name } = readKey({ name: 'of the import key' }, importKey);
  const ephemeral = generateKeyPairSync('ec', { namedCurve: 'P-256' });
  const { x, y } = ephemeral.publicKey.export({ format: 'jwk' });
  const point = encode(tpmsEccPoint, { x: coordinate(x), y: coordinate(y) });
  const z = diffieHellman({ privateKey: ephemeral.privateKey, publicKey: publicKeyObject(publicArea.value) });
  try {
    return { point, secret: importSecret(z, point, name) };
  } finally {
    z.fill(0);
  }
}

function coordinate(text: string | undefined): Buffer {
  return concat(Buffer.from(text ?? '', 'base64url'));
}

function readKey(peer: Pick<Peer, 'name'>, bytes: Uint8Array): ObjectEntity {
  try {
    const key = readPublicKey(bytes, 'import key');
    const { value } = key.publicArea;
    if (value.type !== Alg.ECC || value.parameters.curveID !== Curve.NIST_P256) {
      throw new TpmError('malformed', 'it is not on P-256');
    }
    publicKeyObject(value);
    return key;
  } catch (error) {
    if (!(error instanceof TpmError)) throw error;
    throw refused(peer, `cannot be read: ${error.message}`, error);
  }
}

function refused(peer: Pick<Peer, 'name'>, why: string, cause?: unknown): ManagerError {
  return new ManagerError(
    'peer-import-key',
    `the key that the host "${peer.name}" offers for the state ${why}. Its manager is of another version, or something ` +
      'between changes what it says; nothing was sent',
    { cause },
  );
}
