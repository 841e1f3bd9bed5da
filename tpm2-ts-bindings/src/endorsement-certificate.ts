import { X509Certificate } from 'node:crypto';
import { TpmError } from './error.js';
import { publicKeyObject } from './public-key.js';
import type { Public } from './structures.js';

/** tcg-kp-EKCertificate: the purpose of a certificate for an endorsement key (EK Credential Profile, extendedKeyUsage). */
const EK_PURPOSE = '2.23.133.8.1';
const ASK_THE_MAKER = 'get the certificate from the maker of the TPM instead';

/**
 * The certificate at the start of `bytes`. What follows it is left alone: an NV index is often larger than what is in it.
 * @param what for the message
 * @throws TpmError `malformed`
 */
export function certificateOf(bytes: Uint8Array, what: string): X509Certificate {
  const size = derSize(bytes);
  if (size === undefined) {
    throw new TpmError('malformed', `${what}: it does not start with an X.509 certificate; ${ASK_THE_MAKER}`);
  }
  try {
    const certificate = new X509Certificate(bytes.subarray(0, size));
    // OpenSSL reads the key late; a certificate without one that it knows is of no use.
    void certificate.publicKey;
    return certificate;
  } catch (cause) {
    throw new TpmError(
      'malformed',
      `${what}: an X.509 certificate that cannot be read, or with a key of an unknown kind; ${ASK_THE_MAKER}`,
      { cause },
    );
  }
}

/** All certificates in `bytes`, with or without padding of 0x00 or 0xff between them. @throws TpmError `malformed` */
export function certificatesOf(bytes: Uint8Array, what: string): X509Certificate[] {
  const found: X509Certificate[] = [];
  for (let at = 0; at < bytes.length; ) {
    if (bytes[at] === 0x00 || bytes[at] === 0xff) {
      at += 1;
      continue;
    }
    const certificate = certificateOf(bytes.subarray(at), what);
    found.push(certificate);
    at += certificate.raw.length;
  }
  return found;
}

/** Bytes of the SEQUENCE that starts here, header and content (X.690, 8.1.3); undefined where none does. */
function derSize(bytes: Uint8Array): number | undefined {
  const [tag, first] = bytes;
  if (tag !== 0x30 || first === undefined) return undefined;
  if (first < 0x80) return 2 + first;
  const count = first & 0x7f;
  // More than 64 KiB fit into no NV index, and no length at all (0x80) is not DER.
  if (count < 1 || count > 2 || bytes.length < 2 + count) return undefined;
  return 2 + count + bytes.subarray(2, 2 + count).reduce((size, byte) => size * 256 + byte, 0);
}

/** True where the certificate is for this key. */
export function certifies(certificate: X509Certificate, key: Public): boolean {
  return certificate.publicKey.equals(publicKeyObject(key));
}

/**
 * Checks that one of `roots` vouches for an endorsement key's certificate: names, signatures, dates and that issuers are
 * authorities. Critical extensions are not looked at: the subject of a TPM is in a critical alternative name that OpenSSL
 * does not know. Not checked either: revocation, lengths of paths and constraints on names. Compare the key with
 * `certifies`.
 * @param chain certificates that may lie between; any order, more than needed
 * @param roots the makers' authorities that the caller trusts
 * @param at when it has to be valid
 * @returns the certificates from the given one to a root
 * @throws TpmError `malformed` with the reason
 */
export function verifyEndorsementCertificate(
  certificate: X509Certificate,
  chain: readonly X509Certificate[],
  roots: readonly X509Certificate[],
  at: Date = new Date(),
): X509Certificate[] {
  const purposes = certificate.keyUsage;
  // Without a list of purposes it is good for any (RFC 5280, 4.2.1.12).
  if (purposes !== undefined && !purposes.includes(EK_PURPOSE)) {
    refuse(certificate, 'it is for another purpose than an endorsement key');
  }
  const wrong = datesWrong(certificate, at);
  if (wrong !== undefined) refuse(certificate, wrong);
  const search = { chain, roots, at, flaws: new Set<string>() };
  const path = pathToRoot(certificate, search);
  if (path !== undefined) return path;
  const flaws = search.flaws.size === 0 ? '' : ` (${[...search.flaws].join('; ')})`;
  return refuse(
    certificate,
    `no trusted root vouches for it; its issuer is ${oneLine(certificate.issuer)}${flaws}. ` +
      'Add the certificates of the maker of the TPM, if you trust them',
  );
}

interface Search {
  readonly chain: readonly X509Certificate[];
  readonly roots: readonly X509Certificate[];
  readonly at: Date;
  /** Why issuers by name were passed over. */
  readonly flaws: Set<string>;
}

/**
 * The shortest path to a root; undefined where there is none. No certificate is taken twice: those of a chain come from
 * anyone, and may vouch for each other in circles.
 */
function pathToRoot(certificate: X509Certificate, search: Search): X509Certificate[] | undefined {
  const unused = new Set(search.chain);
  let paths = [[certificate]];
  while (paths.length > 0) {
    const longer: X509Certificate[][] = [];
    for (const path of paths) {
      const last = path.at(-1) ?? certificate;
      for (const root of search.roots) if (issued(last, root, search)) return [...path, root];
      for (const next of unused) {
        if (!issued(last, next, search)) continue;
        unused.delete(next);
        longer.push([...path, next]);
      }
    }
    paths = longer;
  }
  return undefined;
}

function issued(certificate: X509Certificate, issuer: X509Certificate, search: Search): boolean {
  if (!certificate.checkIssued(issuer)) return false;
  const flaw = issuerFlaw(certificate, issuer, search.at);
  if (flaw !== undefined) search.flaws.add(`${oneLine(issuer.subject)}: ${flaw}`);
  return flaw === undefined;
}

function issuerFlaw(certificate: X509Certificate, issuer: X509Certificate, at: Date): string | undefined {
  if (!issuer.ca) return 'it is no authority';
  if (!certificate.verify(issuer.publicKey)) return 'its key did not sign this';
  return datesWrong(issuer, at);
}

function datesWrong({ validFrom, validTo }: X509Certificate, at: Date): string | undefined {
  if (!(Date.parse(validFrom) <= at.getTime())) return `it is valid only from ${validFrom} on`;
  if (!(at.getTime() <= Date.parse(validTo))) return `it expired on ${validTo}`;
  return undefined;
}

/** OpenSSL gives one attribute a line. */
function oneLine(name: string): string {
  return name.replaceAll('\n', ', ');
}

function refuse(certificate: X509Certificate, why: string): never {
  throw new TpmError(
    'malformed',
    `endorsement certificate with serial number ${certificate.serialNumber}: ${why}`,
  );
}
