import { diffieHellman, generateKeyPairSync } from 'node:crypto';
import {
  agreementKeyTemplate,
  concat,
  encode,
  isMadeFrom,
  objectEntity,
  type PublicArea,
  publicKeyObject,
  TpmError,
  tpmsEccPoint,
  verifyCertify,
} from 'tpm2-ts-bindings';
import type { ImportKeyOffer, Peer } from 'vtpm-proto';
import { ManagerError } from '../error.js';
import { fixedPolicy } from '../root-tpm/generation.js';
import { importSecret } from '../root-tpm/import-secret.js';
import type { PlatformFacts } from './evidence.js';
import { readPublicArea } from './public-area.js';
import { attested, bootOf, requireSameBoot, statementBy } from './statement.js';

/** The source's side of the destination's import key. */

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
  const area = readKey(peer, offer.publicArea);
  if (offer.pcrSelection !== facts.pcrSelection) {
    throw refused(
      peer,
      `is bound to the registers ${offer.pcrSelection.slice(0, 80)}, its quote is over ${facts.pcrSelection}`,
    );
  }
  const policy = fixedPolicy(facts.pcrSelection, facts.pcrs);
  if (!isMadeFrom(area, agreementKeyTemplate(policy))) {
    throw refused(
      peer,
      'is not as it has to be: P-256 for ECDH, fixedTPM, stClear, fixedParent, sensitiveDataOrigin, noDA and decrypt, ' +
        'usable only while the registers have the values of its quote',
    );
  }
  const { key, signature } = statementBy(peer, offer.certifySignature);
  const { name } = objectEntity(0, area);
  const certified = attested(peer, () =>
    verifyCertify(Buffer.from(offer.certifyInfo), signature, { key, nonce: transcript, name }),
  );
  requireSameBoot(peer, facts.boot, bootOf(certified));
}

/**
 * A secret for the key: only the TPM that holds it gets the same out of the point (`ImportKey.unwrap`).
 * @param publicArea of a key that `verifyImportKey` took
 * @returns TPMS_ECC_POINT of a key that is used once, and 32 bytes that the caller wipes
 * @throws ManagerError `peer-import-key`
 */
export function sealSecret(publicArea: Uint8Array): { readonly point: Buffer; readonly secret: Buffer } {
  const area = readKey({ name: 'of the import key' }, publicArea);
  const ephemeral = generateKeyPairSync('ec', { namedCurve: 'P-256' });
  const { x, y } = ephemeral.publicKey.export({ format: 'jwk' });
  const point = encode(tpmsEccPoint, { x: coordinate(x), y: coordinate(y) });
  const z = diffieHellman({ privateKey: ephemeral.privateKey, publicKey: publicKeyObject(area.value) });
  try {
    return { point, secret: importSecret(z, point, objectEntity(0, area).name) };
  } finally {
    z.fill(0);
  }
}

function coordinate(text: string | undefined): Buffer {
  return concat(Buffer.from(text ?? '', 'base64url'));
}

function readKey(peer: Pick<Peer, 'name'>, bytes: Uint8Array): PublicArea {
  try {
    const area = readPublicArea(bytes, 'import key');
    publicKeyObject(area.value);
    return area;
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
