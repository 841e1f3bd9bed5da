import {
  ObjectAttribute as A,
  Alg,
  CreatePrimary,
  canEncapsulate,
  type Entity,
  EvictControl,
  flush,
  inSession,
  isInRange,
  type ObjectEntity,
  objectEntity,
  PersistentRange,
  permanent,
  Rc,
  Rh,
  readObject,
  srkTemplate,
  type Tpm,
  TpmError,
  withSession,
} from 'tpm2-ts-bindings';
import { ManagerError } from '../error.js';
import { hexHandle, type RootTpmEnrolment } from './enrolment.js';

/** The storage root key at `handle`; made there where nothing is. What is there is never replaced. */
export async function findOrCreateSrk(
  tpm: Tpm,
  handle: number,
  ownerAuth: Uint8Array,
): Promise<{ srk: ObjectEntity; created: boolean }> {
  const range = PersistentRange.OWNER;
  if (!isInRange(handle, range)) {
    throw new ManagerError(
      'bad-request',
      `the SRK handle has to be between ${hexHandle(range.first)} and ${hexHandle(range.last)}`,
    );
  }
  const existing = await readObject(tpm, handle);
  if (existing !== undefined) {
    const flaw = unfitness(existing);
    if (flaw !== undefined) throw unfit(handle, flaw);
    return { srk: existing, created: false };
  }
  await createSrk(tpm, handle, permanent(Rh.OWNER, ownerAuth));
  const srk = await readObject(tpm, handle);
  if (srk === undefined) throw new ManagerError('tpm-fault', 'the TPM did not keep the SRK it made');
  return { srk, created: true };
}

/** Takes an SRK out again that an enrolment made and could not use. Best effort: the failure is what the caller reports. */
export async function removeSrk(tpm: Tpm, srk: ObjectEntity, ownerAuth: Uint8Array): Promise<void> {
  await inSession(tpm, { kind: 'hmac' }, async (session) => {
    const auth = withSession(permanent(Rh.OWNER, ownerAuth), session);
    await tpm.run(EvictControl, { auth, objectHandle: srk }, { persistentHandle: srk.handle });
  }).catch((error: unknown) => {
    if (!(error instanceof TpmError)) throw error;
  });
}

/** What is left where the TPM does not release the root key any more. */
export const WITHOUT_TPM =
  'If it is lost for good, vtpmctl recover --recovery-key-file FILE enrols another one';

/** @throws ManagerError `tpm-emptied`, `tpm-changed` */
export async function enrolledSrk(tpm: Tpm, enrolment: RootTpmEnrolment): Promise<ObjectEntity> {
  const srk = await readObject(tpm, enrolment.srkHandle);
  if (srk === undefined) {
    throw new ManagerError(
      'tpm-emptied',
      `the storage root key at ${hexHandle(enrolment.srkHandle)} is gone: this is another TPM, or it was cleared. ` +
        `Put the enrolled TPM back. ${WITHOUT_TPM}`,
    );
  }
  if (srk.name.toString('hex') !== enrolment.srkName) {
    throw new ManagerError(
      'tpm-changed',
      `the storage root key at ${hexHandle(enrolment.srkHandle)} is not the enrolled one: this is another TPM, ` +
        'it was cleared and set up again, or something between it and the manager changes its answers. ' +
        WITHOUT_TPM,
    );
  }
  return srk;
}

/** The error for an object at the SRK's handle that cannot serve. */
export function unfit(handle: number, flaw: string, cause?: unknown): ManagerError {
  return new ManagerError(
    'tpm-unfit',
    `the object at ${hexHandle(handle)} cannot be the storage root key: ${flaw}. It is left as it is; ` +
      'choose a free handle or another storage key with --srk-handle',
    { cause },
  );
}

/** Why an object is no storage key to seal under; undefined where it is one. */
export function unfitness({ publicArea }: ObjectEntity): string | undefined {
  const key = publicArea.value;
  const has = (mask: number): boolean => (key.objectAttributes & mask) === mask;
  if (key.type !== Alg.ECC && key.type !== Alg.RSA) return 'it is neither an ECC nor an RSA key';
  if (!has(A.restricted | A.decrypt) || has(A.sign)) return 'it is not a storage key';
  if (!has(A.fixedTPM | A.fixedParent)) return 'it could leave this TPM';
  if (!has(A.sensitiveDataOrigin)) return 'the TPM did not make it';
  if (!has(A.userWithAuth)) return 'it needs a policy';
  if (!canEncapsulate(key)) return 'its algorithm is too weak or not supported';
  return undefined;
}

async function createSrk(tpm: Tpm, handle: number, owner: Entity): Promise<void> {
  const nothing = Buffer.alloc(0);
  // An HMAC session even though there is no key to salt it to yet: it keeps the owner password off the bus.
  await inSession(tpm, { kind: 'hmac' }, async (session) => {
    const authorized = withSession(owner, session);
    const created = await tpm
      .run(
        CreatePrimary,
        { primaryHandle: authorized },
        {
          inSensitive: { userAuth: nothing, data: nothing },
          inPublic: srkTemplate(),
          outsideInfo: nothing,
          creationPCR: [],
        },
      )
      .catch(explainOwner);
    try {
      await tpm.run(
        EvictControl,
        { auth: authorized, objectHandle: objectEntity(created.objectHandle, created.outPublic) },
        { persistentHandle: handle },
      );
    } finally {
      await flush(tpm, created.objectHandle);
    }
  });
}

/** @throws ManagerError where the owner's authorisation was the reason */
export function explainOwner(error: unknown): never {
  if (TpmError.is(error, Rc.AUTH_FAIL, Rc.BAD_AUTH)) {
    throw new ManagerError(
      'bad-request',
      'the TPM has another owner password; give the right one with --owner-auth-file FILE',
      {
        cause: error,
      },
    );
  }
  throw error;
}
