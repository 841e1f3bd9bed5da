import { createHash } from 'node:crypto';
import { type Evidence, type SigningKey, verifySignature } from 'vtpm-proto';
import { ManagerError } from '../error.js';
import { acceptAttestationKey } from './attestation-key.js';
import { readPlatform } from './evidence.js';
import type { Platform } from './statement.js';

/** Format number of identity files; a newer one is refused by name. */
export const IDENTITY_FORMAT = 1;
/** Of a file with a long chain of certificates. */
export const MAX_IDENTITY_BYTES = 64 * 1024;

const IDENTITY_DOMAIN = Buffer.from('vtpm.v1 host identity\0');
const PLATFORM_DOMAIN = Buffer.from('vtpm.v1 host identity platform\0');
const MAX_CERTIFICATES = 16;
const MAX_TEXT = 100;

/** What a host says of itself, for other hosts. Nothing in it is secret. */
export interface HostFacts {
  /** Its Ed25519 host key, 32 bytes. */
  readonly hostId: Buffer;
  /** The Ed25519 key of its TLS certificate, 32 bytes. */
  readonly tlsKey: Buffer;
  /** Ed25519, 32 bytes: what it signs its backups with. */
  readonly backupKey: Buffer;
  /** 16 bytes: what approvals of its policy authority name, with the handle of its revocation counter. */
  readonly installation: Buffer;
  readonly revocationHandle: number;
  readonly tpm: { readonly kind: string; readonly manufacturer: string };
  /** TPMT_PUBLIC each. */
  readonly endorsementKey: Buffer;
  readonly attestationKey: Buffer;
  /** Of the endorsement key, DER, its own first. */
  readonly certificates: readonly Buffer[];
  /** ISO 8601, UTC. */
  readonly createdAt: string;
}

/** A quote over the facts: what its platform was like when the file was made. */
export type PlatformQuote = Pick<Evidence, 'attest' | 'signature' | 'pcrSelection' | 'pcrValues'>;

/** An identity that holds together: signed by its host, its platform by its attestation key. Whose it is, it cannot say. */
export interface VerifiedIdentity {
  readonly facts: HostFacts;
  readonly platform: Platform;
}

/** What the attestation key quotes over: SHA-256 of the facts, 32 bytes. */
export function platformDigest(facts: HostFacts): Buffer {
  return createHash('sha256')
    .update(PLATFORM_DOMAIN)
    .update(JSON.stringify(factsJson(facts)))
    .digest();
}

/** One line of JSON, without the line end. */
export function renderIdentity(facts: HostFacts, quote: PlatformQuote, hostKey: SigningKey): string {
  const body = bodyText(facts, quote);
  return signedText(body, hostKey.sign(Buffer.concat([IDENTITY_DOMAIN, Buffer.from(body)])));
}

/**
 * Reads an identity file, and checks all that can be checked of it alone.
 * @throws ManagerError `bad-request` where it is none, or was changed on its way; `newer-format`; `peer-ak`, `peer-unattested`
 */
export function readIdentity(text: string): VerifiedIdentity {
  const trimmed = text.trim();
  if (trimmed.length > MAX_IDENTITY_BYTES) throw unfit(`it has more than ${MAX_IDENTITY_BYTES} characters`);
  const { facts, quote, signature } = parse(trimmed);
  const body = bodyText(facts, quote);
  // The one text that says this: no second member of a name, no other order, nothing that this version does not know.
  if (signedText(body, signature) !== trimmed) throw unfit('it was changed on its way, or is not whole');
  if (!verifySignature(facts.hostId, Buffer.concat([IDENTITY_DOMAIN, Buffer.from(body)]), signature)) {
    throw unfit('its signature does not verify: it was changed on its way');
  }
  acceptAttestationKey(facts.attestationKey);
  const who = { name: 'of this identity', attestationKey: facts.attestationKey };
  return { facts, platform: readPlatform(who, quote, platformDigest(facts)) };
}

function factsJson(facts: HostFacts): object {
  return {
    'vtpm-peer': IDENTITY_FORMAT,
    hostId: facts.hostId.toString('hex'),
    tlsKey: facts.tlsKey.toString('hex'),
    backupKey: facts.backupKey.toString('hex'),
    installation: facts.installation.toString('hex'),
    revocationHandle: facts.revocationHandle,
    tpm: { kind: facts.tpm.kind, manufacturer: facts.tpm.manufacturer },
    endorsementKey: facts.endorsementKey.toString('base64'),
    attestationKey: facts.attestationKey.toString('base64'),
    certificates: facts.certificates.map((bytes) => bytes.toString('base64')),
    createdAt: facts.createdAt,
  };
}

function bodyText(facts: HostFacts, { pcrSelection, pcrValues, attest, signature }: PlatformQuote): string {
  const platform = {
    pcrSelection,
    pcrValues: pcrValues.map((value) => Buffer.from(value).toString('hex')),
    attest: Buffer.from(attest).toString('base64'),
    signature: Buffer.from(signature).toString('base64'),
  };
  return JSON.stringify({ ...factsJson(facts), platform });
}

function signedText(body: string, signature: Buffer): string {
  return `${body.slice(0, -1)},"signature":"${signature.toString('hex')}"}`;
}

interface Parsed {
  readonly facts: HostFacts;
  readonly quote: PlatformQuote;
  readonly signature: Buffer;
}

function parse(text: string): Parsed {
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch (cause) {
    throw unfit('it is not one line of JSON, as vtpmctl peer identity prints it', cause);
  }
  const file = members('it', value);
  const { 'vtpm-peer': format } = file;
  if (typeof format !== 'number' || !Number.isInteger(format) || format < 1) {
    throw unfit('it does not begin as vtpmctl peer identity prints it');
  }
  if (format > IDENTITY_FORMAT) {
    throw new ManagerError(
      'newer-format',
      `this identity of a host has format ${format}, this version knows ${IDENTITY_FORMAT}; upgrade this host first`,
    );
  }
  const tpm = members('tpm', file.tpm);
  const platform = members('platform', file.platform);
  return {
    facts: {
      hostId: hex('hostId', file.hostId, 32),
      tlsKey: hex('tlsKey', file.tlsKey, 32),
      backupKey: hex('backupKey', file.backupKey, 32),
      installation: hex('installation', file.installation, 16),
      revocationHandle: handle('revocationHandle', file.revocationHandle),
      tpm: { kind: word('tpm.kind', tpm.kind), manufacturer: word('tpm.manufacturer', tpm.manufacturer) },
      endorsementKey: base64('endorsementKey', file.endorsementKey),
      attestationKey: base64('attestationKey', file.attestationKey),
      certificates: list('certificates', file.certificates, MAX_CERTIFICATES).map((one) =>
        base64('certificates', one),
      ),
      createdAt: time('createdAt', file.createdAt),
    },
    quote: {
      pcrSelection: word('platform.pcrSelection', platform.pcrSelection),
      pcrValues: list('platform.pcrValues', platform.pcrValues, 64).map((one) =>
        hex('platform.pcrValues', one),
      ),
      attest: base64('platform.attest', platform.attest),
      signature: base64('platform.signature', platform.signature),
    },
    signature: hex('signature', file.signature, 64),
  };
}

function members(name: string, value: unknown): Readonly<Record<string, unknown>> {
  if (typeof value === 'object' && value !== null && !Array.isArray(value)) {
    return value as Readonly<Record<string, unknown>>;
  }
  throw unfit(`"${name}" is no object`);
}

function list(name: string, value: unknown, most: number): unknown[] {
  if (Array.isArray(value) && value.length <= most) return value;
  throw unfit(`"${name}" is no list of at most ${most}`);
}

/** @param bytes where there is one length alone */
function hex(name: string, value: unknown, bytes?: number): Buffer {
  if (typeof value === 'string' && /^([0-9a-f]{2})+$/.test(value)) {
    if (bytes === undefined || value.length === 2 * bytes) return Buffer.from(value, 'hex');
  }
  throw unfit(`"${name}" is not ${bytes === undefined ? '' : `${2 * bytes} `}hex digits`);
}

function base64(name: string, value: unknown): Buffer {
  if (typeof value === 'string' && value !== '') {
    const bytes = Buffer.from(value, 'base64');
    if (bytes.toString('base64') === value) return bytes;
  }
  throw unfit(`"${name}" is no base64`);
}

/** Printable ASCII: it is shown to people. */
function word(name: string, value: unknown): string {
  if (typeof value === 'string' && /^[ -~]+$/.test(value) && value.length <= MAX_TEXT) return value;
  throw unfit(`"${name}" is no text of 1 to ${MAX_TEXT} printable characters`);
}

function time(name: string, value: unknown): string {
  if (typeof value === 'string' && /^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$/.test(value)) return value;
  throw unfit(`"${name}" is no time in UTC`);
}

/** Of an NV index (Part 2, "TPM_HT"). */
function handle(name: string, value: unknown): number {
  if (typeof value === 'number' && Number.isInteger(value) && value >>> 24 === 0x01) return value;
  throw unfit(`"${name}" is no handle of an NV index`);
}

function unfit(why: string, cause?: unknown): ManagerError {
  return new ManagerError(
    'bad-request',
    `this is no identity of a host: ${why}. Take it there anew: vtpmctl peer identity`,
    { cause },
  );
}
