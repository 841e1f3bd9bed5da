import type { X509Certificate } from 'node:crypto';
import { concat } from './bytes.js';
import { listHandles } from './client.js';
import { ActivateCredential } from './commands/index.js';
import { Ht } from './constants.js';
import type { Credential } from './credential.js';
import { certificateOf, certificatesOf } from './endorsement-certificate.js';
import {
  ENDORSEMENT_KEY_NAMES,
  type EndorsementKeyName,
  endorsementKeyKind,
  endorsementPolicy,
} from './endorsement-key.js';
import { type Authorized, type ObjectEntity, withSession } from './entity.js';
import { readNvContent } from './nv-content.js';
import { inSession } from './open-session.js';
import { runPolicy } from './policy.js';
import { isInRange, NvRange } from './registry.js';
import type { Session, SessionOptions } from './session.js';
import { type PublicArea, tpmtPublic } from './structures.js';
import { endorsementKeyTemplate } from './templates.js';
import type { Tpm } from './tpm.js';
import { Reader } from './wire.js';

/** An endorsement key in the TPM, of a known kind. */
export interface EndorsementKey {
  readonly name: EndorsementKeyName;
  readonly entity: ObjectEntity;
  /** The endorsement hierarchy with what authorises its use; with its empty authValue unless given. */
  readonly by?: Authorized;
}

/**
 * Runs `body` with a policy session that authorises one use of an endorsement key. It is salted to the key itself, and
 * encrypts what the use says first to the TPM or from it, so that a credential is not seen on the bus.
 * @param encrypt which first parameters the command has
 * @throws TpmError with the response AUTH_FAIL or BAD_AUTH where the endorsement hierarchy has another authValue
 */
export function inEndorsementSession<T>(
  tpm: Tpm,
  key: EndorsementKey,
  encrypt: NonNullable<SessionOptions['encrypt']>,
  body: (session: Session) => Promise<T>,
): Promise<T> {
  const { nameAlg } = endorsementKeyKind(key.name);
  const options = { kind: 'policy', authHash: nameAlg, salt: key.entity, encrypt } as const;
  return inSession(tpm, options, async (session) => {
    await runPolicy(tpm, session, endorsementPolicy(key.name, key.by));
    return body(session);
  });
}

/**
 * The secret of a credential that was made for this endorsement key and the Name of this object (`makeCredential`).
 * @param object with what authorises its ADMIN role: for attestation keys of ours, its authValue
 * @throws TpmError with the response INTEGRITY or VALUE where it was made for another key or object, or changed
 */
export function activateCredential(
  tpm: Tpm,
  key: EndorsementKey,
  object: Authorized,
  credential: Credential,
): Promise<Buffer> {
  return inEndorsementSession(tpm, key, 'both', async (session) => {
    const { certInfo } = await tpm.run(
      ActivateCredential,
      { activateHandle: object, keyHandle: withSession(key.entity, session) },
      credential,
    );
    return certInfo;
  });
}

/** The kinds of endorsement key that the TPM has certificates of, without reading them. */
export async function listEndorsementCertificates(tpm: Tpm): Promise<EndorsementKeyName[]> {
  const indices = new Set(await listHandles(tpm, Ht.NV_INDEX));
  return ENDORSEMENT_KEY_NAMES.filter((name) => indices.has(endorsementKeyKind(name).certificateIndex));
}

/**
 * The certificate that the maker of the TPM put into it. It says nothing before `verifyEndorsementCertificate`.
 * @returns undefined where there is none: some makers give it out over the network
 * @throws TpmError `malformed` where the index holds something else
 */
export async function readEndorsementCertificate(
  tpm: Tpm,
  name: EndorsementKeyName,
): Promise<X509Certificate | undefined> {
  const { certificateIndex } = endorsementKeyKind(name);
  const bytes = await readNvContent(tpm, certificateIndex);
  if (bytes === undefined) return undefined;
  return certificateOf(bytes, `NV index 0x${certificateIndex.toString(16).padStart(8, '0')}`);
}

/**
 * The template of the key that the TPM's certificate is for: the one its maker left in the TPM, or the default one. Its
 * maker may have changed anything in it, and a nonce (`NvIndex.EK_NONCE_…`) is not looked at: compare the key that it
 * makes with the certificate.
 * @throws TpmError `malformed` where the index holds something else
 */
export async function readEndorsementKeyTemplate(tpm: Tpm, name: EndorsementKeyName): Promise<PublicArea> {
  const bytes = await readNvContent(tpm, endorsementKeyKind(name).templateIndex);
  if (bytes === undefined) return endorsementKeyTemplate(name);
  // What is after it in the index is not part of it.
  const reader = new Reader(bytes, 'EK template in the TPM');
  return reader.capture(() => tpmtPublic.read(reader));
}

/**
 * The certificates between those of the endorsement keys and a root, as far as the TPM has them. One may go on from one
 * index into the next (EK Credential Profile, 2.2.1.5.2).
 * @throws TpmError `malformed` where the indices hold something else
 */
export async function readEndorsementChain(tpm: Tpm): Promise<X509Certificate[]> {
  const range = NvRange.EK_CERTIFICATE_CHAIN;
  const handles = (await listHandles(tpm, Ht.NV_INDEX)).filter((handle) => isInRange(handle, range));
  const parts: Buffer[] = [];
  for (const handle of handles.sort((a, b) => a - b)) {
    const bytes = await readNvContent(tpm, handle);
    if (bytes !== undefined) parts.push(bytes);
  }
  return certificatesOf(concat(...parts), 'the certificate chain in the TPM');
}
