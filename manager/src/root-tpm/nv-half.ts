import { randomInt } from 'node:crypto';
import {
  Alg,
  type Entity,
  embed,
  Ht,
  listHandles,
  NvAttribute as N,
  NV_DefineSpace,
  NV_UndefineSpace,
  NV_Write,
  type NvEntity,
  nvEntity,
  Rc,
  readNvIndex,
  type Session,
  type Tpm,
  TpmError,
  tpmsNvPublic,
  withSession,
} from 'tpm2-ts-bindings';
import { ManagerError } from '../error.js';
import { SECRET_BYTES } from './enrolment.js';
import { explainOwner } from './srk.js';

/** Part of the owner's NV range (TCG Handle Registry: 0x01800000 to 0x01bfffff). */
const FIRST_HANDLE = 0x01810000;
const HANDLES = 0x10000;

/** Whether an index may be the half of some installation: nothing else should be in this range. */
export function isNvHalfHandle(handle: number): boolean {
  return handle >= FIRST_HANDLE && handle < FIRST_HANDLE + HANDLES;
}

/** Read by policy, written by the owner, who can so erase the past. WRITTEN comes with the first write. */
const ATTRIBUTES = N.POLICYREAD | N.OWNERWRITE | N.NO_DA;

/** Makes an index with the NV half in it. @param session salted, encrypting to the TPM */
export async function writeNvHalf(
  tpm: Tpm,
  session: Session,
  owner: Entity,
  authPolicy: Buffer,
  half: Buffer,
): Promise<NvEntity> {
  const defined = await defineIndex(tpm, session, owner, authPolicy);
  try {
    await tpm.run(
      NV_Write,
      { authHandle: withSession(owner, session), nvIndex: defined },
      { data: half, offset: 0 },
    );
    // With the first write WRITTEN is set, and the Name is another one.
    const written = await readNvIndex(tpm, defined.handle);
    if (written === undefined || nvHalfFlaw(written, authPolicy) !== undefined) {
      throw new ManagerError('tpm-fault', 'the TPM did not keep the NV index as it was defined');
    }
    return written;
  } catch (error) {
    await removeNvHalf(tpm, session, owner, defined.handle);
    throw error;
  }
}

/** Removes the index again, for an enrolment that fails. Best effort: the failure itself is what the caller reports. */
export async function removeNvHalf(tpm: Tpm, session: Session, owner: Entity, handle: number): Promise<void> {
  try {
    const index = await readNvIndex(tpm, handle);
    if (index === undefined) return;
    await tpm.run(NV_UndefineSpace, { authHandle: withSession(owner, session), nvIndex: index }, {});
  } catch (error) {
    if (!(error instanceof TpmError)) throw error;
  }
}

/** Indices that look like a half of a root key: of other installations on this TPM, or of one whose home is gone. */
export async function otherNvHalves(tpm: Tpm): Promise<number[]> {
  const found: number[] = [];
  for (const handle of await listHandles(tpm, Ht.NV_INDEX)) {
    if (handle < FIRST_HANDLE || handle >= FIRST_HANDLE + HANDLES) continue;
    const index = await readNvIndex(tpm, handle);
    if (index && nvHalfFlaw(index, index.nvPublic.value.authPolicy) === undefined) found.push(handle);
  }
  return found;
}

/** Why an index is not the one that enrolment made; undefined where it is. */
export function nvHalfFlaw({ nvPublic }: NvEntity, authPolicy: Buffer): string | undefined {
  const { attributes, authPolicy: policy, dataSize } = nvPublic.value;
  if (attributes >>> 0 !== (ATTRIBUTES | N.WRITTEN) >>> 0) return 'its attributes are others';
  if (!policy.equals(authPolicy)) return 'its policy is another';
  if (dataSize !== SECRET_BYTES) return 'its size is another';
  return undefined;
}

async function defineIndex(tpm: Tpm, session: Session, owner: Entity, authPolicy: Buffer): Promise<NvEntity> {
  for (let attempt = 0; ; attempt++) {
    const nvPublic = embed(tpmsNvPublic, {
      nvIndex: FIRST_HANDLE + randomInt(HANDLES),
      nameAlg: Alg.SHA256,
      attributes: ATTRIBUTES,
      authPolicy,
      dataSize: SECRET_BYTES,
    });
    try {
      await tpm.run(
        NV_DefineSpace,
        { authHandle: withSession(owner, session) },
        { auth: Buffer.alloc(0), publicInfo: nvPublic },
      );
      return nvEntity(nvPublic);
    } catch (error) {
      if (TpmError.is(error, Rc.NV_SPACE)) {
        throw new ManagerError(
          'tpm-unfit',
          'the TPM has no NV space left; remove an index no longer in use',
          {
            cause: error,
          },
        );
      }
      // The handle is in use: another one.
      if (!TpmError.is(error, Rc.NV_DEFINED) || attempt === 15) explainOwner(error);
    }
  }
}
