import {
  attestationKeyTemplate,
  type Child,
  createChild,
  decode,
  encode,
  inSession,
  loadChild,
  type ObjectEntity,
  Rc,
  type Session,
  struct,
  type Tpm,
  TpmError,
  tpm2b,
  tpm2bPublic,
  whileLoaded,
  withPassword,
  withSession,
} from 'tpm2-ts-bindings';
import { ManagerError } from '../error.js';
import { checkEnrolmentFormat, type RootTpmEnrolment } from './enrolment.js';
import { enrolledSrk } from './srk.js';

/** The host's attestation key: made by the chip once, kept outside of it, and of use in this chip alone. */

/** TPM2B_PRIVATE, TPM2B_PUBLIC. */
const keptKey = struct({ outPrivate: tpm2b, outPublic: tpm2bPublic });

/** The TPM with what a statement of it needs. */
export interface Attesting {
  readonly tpm: Tpm;
  /** Salted: proves the answers. */
  readonly session: Session;
  readonly srk: ObjectEntity;
  readonly key: ObjectEntity;
}

/** @returns what to keep: nothing in it is secret */
export async function makeAttestationKey(tpm: Tpm, enrolment: RootTpmEnrolment): Promise<Buffer> {
  checkEnrolmentFormat(enrolment);
  const srk = await enrolledSrk(tpm, enrolment);
  return inSession(tpm, { kind: 'hmac', encrypt: 'both', salt: srk }, async (session) => {
    const child = await createChild(tpm, withSession(srk, session), attestationKeyTemplate());
    return encode(keptKey, child);
  });
}

/** The TPMT_PUBLIC. @throws ManagerError `store-corrupt` */
export function attestationPublic(blob: Uint8Array): Buffer {
  return readKept(blob).outPublic.bytes;
}

/** Runs `body` with the key loaded. @throws ManagerError `tpm-changed` where it is another TPM's */
export async function attesting<T>(
  tpm: Tpm,
  enrolment: RootTpmEnrolment,
  blob: Uint8Array,
  body: (attesting: Attesting) => Promise<T>,
): Promise<T> {
  checkEnrolmentFormat(enrolment);
  const child = readKept(blob);
  const srk = await enrolledSrk(tpm, enrolment);
  return inSession(tpm, { kind: 'hmac', salt: srk }, (session) =>
    whileLoaded(tpm, load(tpm, srk, session, child), (key) => body({ tpm, session, srk, key })),
  );
}

async function load(tpm: Tpm, srk: ObjectEntity, session: Session, child: Child): Promise<ObjectEntity> {
  try {
    // The SRK's empty password opens nothing; the session beside it proves the answer.
    return await loadChild(tpm, withPassword(srk), child, { sessions: [session] });
  } catch (error) {
    if (!TpmError.is(error, Rc.INTEGRITY, Rc.SIZE, Rc.BINDING)) throw error;
    throw new ManagerError(
      'tpm-changed',
      'the TPM does not take the attestation key of this host: it was made in another TPM, or before this one was ' +
        'cleared. vtpmctl recover enrols the TPM and has another key made; the peers then need vtpmctl peer identity',
      { cause: error },
    );
  }
}

function readKept(blob: Uint8Array): Child {
  try {
    return decode(keptKey, blob, 'attestation key');
  } catch (cause) {
    throw new ManagerError(
      'store-corrupt',
      'the attestation key in the trust configuration is not readable; restore the store from a backup',
      { cause },
    );
  }
}
