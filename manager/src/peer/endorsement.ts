import { createHash, X509Certificate } from 'node:crypto';
import {
  ObjectAttribute as A,
  canEncapsulate,
  certificateOf,
  certifies,
  type Public,
  TpmError,
  verifyEndorsementCertificate,
} from 'tpm2-ts-bindings';
import { ManagerError } from '../error.js';
import { readPublicKey } from './public-area.js';
import { refusing } from './refusing.js';

const { refused, asRefusal } = refusing('peer-ek', 'endorsement key');

/** How an operator knows another host's TPM. */
export type EndorsementTrust =
  /** By authorities of TPM makers that he trusts: certificates in PEM, any number. */
  | { readonly ca: string }
  /** By what he read at the host itself, as `endorsementFingerprint` has it. */
  | { readonly fingerprint: string };

/** More certificates than this are no chain. */
const MAX_CERTIFICATES = 16;
const PEM = /-----BEGIN CERTIFICATE-----[A-Za-z0-9+/=\s]+-----END CERTIFICATE-----/g;
/** nameAlg of the Name, which is in front of the digest where an operator copied it from a TPM's own tools. */
const NAME_PREFIX = /^(?:0x)?(?:000b)?/;

/** SHA-256 over the public area, hex: the Name of the endorsement key without its hash's number. */
export function endorsementFingerprint(publicArea: Uint8Array): string {
  return createHash('sha256').update(publicArea).digest('hex');
}

/**
 * Accepts another host's endorsement key, or says why not. Nothing of it proves that the host has that TPM: see
 * `makeChallenge`.
 * @param offered the TPMT_PUBLIC and the certificates, DER, the key's own first
 * @param at when the certificates have to be valid
 * @returns by what it was accepted, for people: `pinned`, or the authority's subject
 * @throws ManagerError `peer-ek`; `bad-request` where what the operator gave is nothing to trust
 */
export function acceptEndorsement(
  offered: { readonly publicArea: Uint8Array; readonly certificates: readonly Uint8Array[] },
  trust: EndorsementTrust,
  at: Date = new Date(),
): string {
  const key = readKey(offered.publicArea);
  if ('fingerprint' in trust) {
    checkPinned(offered.publicArea, trust.fingerprint);
    return 'pinned';
  }
  const roots = readRoots(trust.ca);
  const [own, ...chain] = readCertificates(offered.certificates);
  if (own === undefined) {
    throw refused(
      'has no certificate, so no authority vouches for it. Pin it: read its fingerprint at the other host ' +
        '(vtpmctl peer identity) and give it with --ek-fingerprint',
    );
  }
  return asRefusal(() => {
    if (!certifies(own, key)) throw new TpmError('malformed', 'the certificate is for another key');
    const path = verifyEndorsementCertificate(own, chain, roots, at);
    return (path.at(-1) ?? own).subject.replaceAll('\n', ', ');
  });
}

function readKey(bytes: Uint8Array): Public {
  const { value } = asRefusal(() => readPublicKey(bytes, 'endorsement key')).publicArea;
  const has = (mask: number): boolean => (value.objectAttributes & mask) === mask;
  if (!canEncapsulate(value)) throw refused('is of a kind that no secret can be sent to');
  if (!has(A.restricted | A.decrypt) || has(A.sign)) throw refused('is no storage key');
  if (!has(A.fixedTPM | A.fixedParent | A.sensitiveDataOrigin)) throw refused('could be outside of its TPM');
  return value;
}

function checkPinned(publicArea: Uint8Array, fingerprint: string): void {
  const wanted = fingerprint.trim().toLowerCase().replaceAll(':', '').replace(NAME_PREFIX, '');
  if (!/^[0-9a-f]{64}$/.test(wanted)) {
    throw new ManagerError('bad-request', 'a fingerprint of an endorsement key is 64 hex digits');
  }
  const is = endorsementFingerprint(publicArea);
  if (is === wanted) return;
  throw refused(
    `has the fingerprint ${is} and not the one that was given: this is another TPM. Compare it at the other host`,
  );
}

function readRoots(pem: string): X509Certificate[] {
  try {
    const roots = (pem.match(PEM) ?? []).map((text) => new X509Certificate(text));
    if (roots.length > 0) return roots;
  } catch (cause) {
    throw new ManagerError('bad-request', 'a certificate of the authorities cannot be read', { cause });
  }
  throw new ManagerError(
    'bad-request',
    'there is no certificate in PEM among the authorities that were given',
  );
}

function readCertificates(certificates: readonly Uint8Array[]): X509Certificate[] {
  if (certificates.length > MAX_CERTIFICATES) throw refused(`has more than ${MAX_CERTIFICATES} certificates`);
  return certificates.map((bytes) =>
    asRefusal(() => certificateOf(bytes, 'certificate of the endorsement key')),
  );
}
