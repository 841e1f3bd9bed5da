import {
  flush,
  inSession,
  Load,
  NV_Read,
  type NvEntity,
  type ObjectEntity,
  objectEntity,
  type PolicyStep,
  Rc,
  readNvIndex,
  readObject,
  runPolicy,
  type Session,
  type Tpm,
  TpmError,
  Unseal,
  wipe,
  withPassword,
  withSession,
} from 'tpm2-ts-bindings';
import { ManagerError } from '../error.js';
import {
  checkEnrolmentFormat,
  hexHandle,
  type RootTpmEnrolment,
  readSelection,
  SECRET_BYTES,
} from './enrolment.js';
import { nvHalfFlaw } from './nv-half.js';
import { deriveRootKey } from './root-key.js';
import { readSealedPublic, sealedFlaw } from './sealed.js';

/** Something, a kernel's measurement log for instance, may extend a PCR between policy and use: then once more. */
const POLICY_ATTEMPTS = 5;

export async function releaseRootKey(tpm: Tpm, enrolment: RootTpmEnrolment): Promise<Buffer> {
  checkEnrolmentFormat(enrolment);
  const authPolicy = Buffer.from(enrolment.policyDigest, 'hex');
  const sealedPublic = readSealedPublic(enrolment.sealedPublic);
  const flaw = sealedFlaw(sealedPublic, authPolicy);
  if (flaw !== undefined) {
    throw new ManagerError('tpm-fault', `the enrolled sealed object is not acceptable: ${flaw}`);
  }
  // Before anything is salted to the key: whoever sits on the bus could offer one of his own.
  const srk = await enrolledSrk(tpm, enrolment);
  const index = await enrolledIndex(tpm, enrolment, authPolicy);

  return inSession(tpm, { kind: 'policy', encrypt: 'both', salt: srk }, async (session) => {
    const sealed = await load(tpm, session, srk, enrolment, objectEntity(0, sealedPublic));
    let rootSecret: Buffer | undefined;
    let nvHalf: Buffer | undefined;
    try {
      rootSecret = await underPolicy(tpm, session, enrolment, async () => {
        const { outData } = await tpm.run(Unseal, { itemHandle: withSession(sealed, session) }, {});
        return outData;
      });
      nvHalf = await underPolicy(tpm, session, enrolment, async () => {
        const authHandle = withSession(index, session);
        const range = { size: SECRET_BYTES, offset: 0 };
        return (await tpm.run(NV_Read, { authHandle, nvIndex: index }, range)).data;
      });
      if (rootSecret.length !== SECRET_BYTES || nvHalf.length !== SECRET_BYTES) {
        throw new ManagerError('tpm-fault', 'the TPM released secrets of the wrong length');
      }
      return deriveRootKey(rootSecret, nvHalf, Buffer.from(enrolment.installation, 'hex'));
    } finally {
      wipe(rootSecret, nvHalf);
      await flush(tpm, sealed.handle);
    }
  });
}

async function enrolledSrk(tpm: Tpm, enrolment: RootTpmEnrolment): Promise<ObjectEntity> {
  const srk = await readObject(tpm, enrolment.srkHandle);
  if (srk === undefined) {
    throw new ManagerError(
      'tpm-emptied',
      `the storage root key at ${hexHandle(enrolment.srkHandle)} is gone: this is another TPM, or it was cleared. ` +
        'Put the enrolled TPM back',
    );
  }
  if (srk.name.toString('hex') !== enrolment.srkName) {
    throw new ManagerError(
      'tpm-changed',
      `the storage root key at ${hexHandle(enrolment.srkHandle)} is not the enrolled one: this is another TPM, ` +
        'it was cleared and set up again, or something between it and the manager changes its answers',
    );
  }
  return srk;
}

async function enrolledIndex(tpm: Tpm, enrolment: RootTpmEnrolment, authPolicy: Buffer): Promise<NvEntity> {
  const index = await readNvIndex(tpm, enrolment.nvHandle);
  const where = `the NV index ${hexHandle(enrolment.nvHandle)}, which holds a half of the root key,`;
  if (index === undefined) {
    throw new ManagerError(
      'tpm-emptied',
      `${where} is gone: it was removed or the TPM was cleared. What is sealed to it cannot be opened again`,
    );
  }
  if (index.name.toString('hex') !== enrolment.nvName || nvHalfFlaw(index, authPolicy) !== undefined) {
    throw new ManagerError(
      'tpm-changed',
      `${where} was made anew with other properties. What is sealed to it cannot be opened again`,
    );
  }
  return index;
}

async function load(
  tpm: Tpm,
  session: Session,
  srk: ObjectEntity,
  enrolment: RootTpmEnrolment,
  expected: ObjectEntity,
): Promise<ObjectEntity> {
  try {
    // The SRK's empty password opens nothing; the session beside it proves the answer.
    const { objectHandle, name } = await tpm.run(
      Load,
      { parentHandle: withPassword(srk) },
      { inPrivate: Buffer.from(enrolment.sealedPrivate, 'base64'), inPublic: expected.publicArea },
      [session],
    );
    const sealed = objectEntity(objectHandle, expected.publicArea);
    if (!name.equals(sealed.name)) {
      await flush(tpm, objectHandle);
      throw new ManagerError('tpm-fault', 'the TPM loaded something else than the sealed object');
    }
    return sealed;
  } catch (error) {
    if (TpmError.is(error, Rc.INTEGRITY, Rc.SIZE, Rc.BINDING)) {
      throw new ManagerError(
        'tpm-fault',
        'the TPM does not take the enrolled sealed object: the enrolment is damaged; restore it from a backup',
        { cause: error },
      );
    }
    throw error;
  }
}

/** Satisfies the policy and runs `use`. The chip itself gives the verdict: nothing is compared on the host. */
async function underPolicy<T>(
  tpm: Tpm,
  session: Session,
  enrolment: RootTpmEnrolment,
  use: () => Promise<T>,
): Promise<T> {
  const selection = readSelection(enrolment.pcrSelection);
  const steps: PolicyStep[] = [{ assert: 'pcr', selection }];
  for (let attempt = 1; ; attempt++) {
    try {
      await runPolicy(tpm, session, steps);
      return await use();
    } catch (error) {
      if (TpmError.is(error, Rc.PCR_CHANGED) && attempt < POLICY_ATTEMPTS) continue;
      if (!TpmError.is(error, Rc.POLICY_FAIL, Rc.VALUE, Rc.PCR_CHANGED)) throw error;
      throw new ManagerError(
        'platform-policy',
        `the TPM refuses the root key: a PCR of ${enrolment.pcrSelection} has another value than at enrolment. ` +
          'Boot the enrolled firmware, kernel and settings again',
        { cause: error },
      );
    }
  }
}
