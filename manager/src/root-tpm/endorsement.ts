import type { X509Certificate } from 'node:crypto';
import {
  Alg,
  activateCredential as activate,
  type Credential,
  certifies,
  createPrimary,
  type EndorsementKey,
  type EndorsementKeyName,
  isMadeFrom,
  listEndorsementCertificates,
  type ObjectEntity,
  PersistentHandle,
  type PublicArea,
  permanent,
  Rc,
  Rh,
  readEndorsementCertificate,
  readEndorsementChain,
  readEndorsementKeyTemplate,
  readObject,
  type Tpm,
  TpmError,
  whileLoaded,
  withPassword,
} from 'tpm2-ts-bindings';
import { ManagerError } from '../error.js';
import { attesting } from './attestation-key.js';
import type { RootTpmEnrolment } from './enrolment.js';

/** What the chip's maker gave it: the endorsement key, and certificates that vouch for it. */
export interface Endorsement {
  /** TPMT_PUBLIC. Whoever sits on the bus may offer another key: its certificate, or its fingerprint, says whose it is. */
  readonly publicArea: Buffer;
  /** DER, the key's own first. Empty where the chip has none for it. */
  readonly certificates: Buffer[];
}

export function readEndorsement(tpm: Tpm): Promise<Endorsement> {
  return withEndorsementKey(tpm, async ({ name, entity }) => {
    const { publicArea } = entity;
    const own = await readQuietly(() => readEndorsementCertificate(tpm, name));
    if (own === undefined || !certifies(own, publicArea.value)) {
      return { publicArea: publicArea.bytes, certificates: [] };
    }
    const chain = (await readQuietly(() => readEndorsementChain(tpm))) ?? [];
    return {
      publicArea: publicArea.bytes,
      certificates: [own, ...chain].map(({ raw }: X509Certificate) => raw),
    };
  });
}

/**
 * The secret of a challenge that was made for this chip's endorsement key and the attestation key's Name.
 * @throws ManagerError `peer-ek` where it was made for others
 */
export function activateCredential(
  tpm: Tpm,
  enrolment: RootTpmEnrolment,
  blob: Uint8Array,
  credential: Credential,
): Promise<Buffer> {
  return attesting(tpm, enrolment, blob, ({ key }) =>
    withEndorsementKey(tpm, async (endorsementKey) => {
      try {
        return await activate(tpm, endorsementKey, withPassword(key), credential);
      } catch (error) {
        if (!TpmError.is(error, Rc.INTEGRITY, Rc.VALUE, Rc.SIZE, Rc.ECC_POINT, Rc.INSUFFICIENT)) throw error;
        throw new ManagerError(
          'peer-ek',
          'the challenge of the other host is not for the endorsement and attestation key of this one: it enrolled ' +
            'another TPM. Take vtpmctl peer identity of this host there once more',
          { cause: error },
        );
      }
    }),
  );
}

/** The first of these that the chip has a certificate of; the first where it has none. ECC keys are quick to make. */
const PREFERRED: readonly EndorsementKeyName[] = ['L-2', 'H-2', 'H-3', 'H-4', 'L-1', 'H-1', 'H-6', 'H-7'];

async function keyName(tpm: Tpm): Promise<EndorsementKeyName> {
  const certified = await listEndorsementCertificates(tpm);
  return PREFERRED.find((name) => certified.includes(name)) ?? 'L-2';
}

async function withEndorsementKey<T>(tpm: Tpm, body: (key: EndorsementKey) => Promise<T>): Promise<T> {
  const name = await keyName(tpm);
  const template = await readQuietly(() => readEndorsementKeyTemplate(tpm, name));
  if (template === undefined) {
    throw new ManagerError('tpm-unfit', 'the TPM has a template of its endorsement key that is not readable');
  }
  // A chip takes seconds to make an RSA key: firmware or another program may have kept it.
  const { EK_RSA, EK_ECC } = PersistentHandle;
  const kept = await readObject(tpm, template.value.type === Alg.RSA ? EK_RSA : EK_ECC);
  if (kept !== undefined && isMadeFrom(kept.publicArea, template)) return body({ name, entity: kept });
  return whileLoaded(tpm, make(tpm, template), (entity) => body({ name, entity }));
}

async function make(tpm: Tpm, template: PublicArea): Promise<ObjectEntity> {
  try {
    return await createPrimary(tpm, template, { hierarchy: withPassword(permanent(Rh.ENDORSEMENT)) });
  } catch (error) {
    if (!TpmError.is(error, Rc.AUTH_FAIL, Rc.BAD_AUTH, Rc.HIERARCHY)) throw error;
    throw new ManagerError(
      'tpm-unfit',
      "the TPM's endorsement hierarchy has a password or is switched off, so its endorsement key is out of reach; " +
        'without it this host cannot prove to others which TPM it has. Clear it: tpm2_changeauth -c endorsement',
      { cause: error },
    );
  }
}

/** What is in the maker's NV indices may be anything; it is no reason to have no endorsement key. */
async function readQuietly<T>(read: () => Promise<T>): Promise<T | undefined> {
  try {
    return await read();
  } catch (error) {
    if (error instanceof TpmError && (error.code === 'malformed' || error.code === 'tpm')) return undefined;
    throw error;
  }
}
