import { randomBytes, randomInt } from 'node:crypto';
import {
  Alg,
  type Embedded,
  type Entity,
  embed,
  Ht,
  listHandles,
  NvAttribute as N,
  NV_DefineSpace,
  NV_ReadPublic,
  NV_UndefineSpace,
  NV_Write,
  type NvEntity,
  type NvPublic,
  nvEntity,
  Rc,
  readNvIndex,
  type Session,
  type Tpm,
  TpmError,
  tpmsNvPublic,
  withSession,
} from 'tpm2-ts-bindings';
import { barrier } from 'vtpm-common';
import { ManagerError } from '../error.js';
import { hexHandle, type NvIndexRef } from './enrolment.js';
import { explainOwner } from './srk.js';

/** Part of the owner's NV range (TCG Handle Registry: 0x01800000 to 0x01bfffff). */
const FIRST_HANDLE = 0x01810000;
const HANDLES = 0x10000;
/** The index type, bits 4 to 7 of TPMA_NV; 0 is one of plain bytes. */
const NV_TYPE = 0xf << 4;

/** What kind of index: with the handle it gives the Name. */
export interface NvShape {
  /** Without WRITTEN, which comes with the first write. */
  readonly attributes: number;
  readonly authPolicy: Buffer;
  readonly dataSize: number;
}

/** An index that is about to be made. Its Name is known before, so that what removes it can be written down first. */
export interface PlannedIndex {
  readonly ref: NvIndexRef;
  readonly shape: NvShape;
}

/** Whether an index may be of some installation: nothing else should be in this range. */
export function isOurHandle(handle: number): boolean {
  return handle >= FIRST_HANDLE && handle < FIRST_HANDLE + HANDLES;
}

/** Every index in the range: of other installations on this TPM, or of ones whose home is gone. */
export async function indicesInRange(tpm: Tpm): Promise<number[]> {
  return (await listHandles(tpm, Ht.NV_INDEX)).filter(isOurHandle);
}

/** Chooses free handles. @param reserved handles that are not used yet and will be */
export async function planIndices<T extends Readonly<Record<string, NvShape>>>(
  tpm: Tpm,
  shapes: T,
  reserved: readonly NvIndexRef[] = [],
): Promise<{ readonly [K in keyof T]: PlannedIndex }> {
  const taken = new Set(await listHandles(tpm, Ht.NV_INDEX));
  for (const { handle } of reserved) taken.add(handle);
  const planned = Object.entries(shapes).map(([name, shape]) => {
    let handle: number;
    do handle = FIRST_HANDLE + randomInt(HANDLES);
    while (taken.has(handle));
    taken.add(handle);
    const ref = { handle, name: writtenEntity(handle, shape).name.toString('hex') };
    return [name, { ref, shape }] as const;
  });
  return Object.fromEntries(planned) as { [K in keyof T]: PlannedIndex };
}

/** @param session salted, encrypting to the TPM @param auth its authValue */
export async function defineIndex(
  tpm: Tpm,
  session: Session,
  owner: Entity,
  { ref, shape }: PlannedIndex,
  auth: Uint8Array = Buffer.alloc(0),
): Promise<NvEntity> {
  const publicInfo = publicOf(ref.handle, shape, 0);
  try {
    await tpm.run(
      NV_DefineSpace,
      { authHandle: withSession(owner, session) },
      { auth: Buffer.from(auth.buffer, auth.byteOffset, auth.length), publicInfo },
    );
  } catch (error) {
    if (TpmError.is(error, Rc.NV_SPACE)) {
      throw new ManagerError('tpm-unfit', 'the TPM has no NV space left; remove an index no longer in use', {
        cause: error,
      });
    }
    explainOwner(error);
  }
  return nvEntity(publicInfo, auth);
}

/** The index as it is after its first write. @throws ManagerError `tpm-fault` where it is not as it was planned */
export async function checkWritten(tpm: Tpm, { ref }: PlannedIndex, auth?: Uint8Array): Promise<NvEntity> {
  const written = await readNvIndex(tpm, ref.handle, auth);
  if (written?.name.toString('hex') !== ref.name) {
    throw new ManagerError('tpm-fault', 'the TPM did not keep the NV index as it was defined');
  }
  return written;
}

/** The entity that the enrolment names, computed and not asked for. */
export function writtenEntity(handle: number, shape: NvShape, auth?: Uint8Array): NvEntity {
  return nvEntity(publicOf(handle, shape, N.WRITTEN), auth);
}

/**
 * `gone`: nothing is at the handle. `other`: something that was never ours, and is left as it is. In either case the index
 * itself is not in the TPM.
 */
export type Removal = 'removed' | 'gone' | 'other';

/**
 * Overwrites an index of plain bytes with random ones, then undefines it, where it has the Name that was planned, written
 * or not yet. Can be repeated.
 * @param session proves each outcome where it is salted to a key of this TPM
 * @throws ManagerError `bad-request` where the owner password is another; `tpm-fault` where it is denied that the index is
 * there, and it is
 */
export async function removeIndex(
  tpm: Tpm,
  session: Session,
  owner: Entity,
  { handle, name }: NvIndexRef,
): Promise<Removal> {
  let index = await readNvIndex(tpm, handle);
  if (index === undefined) {
    await proveAbsence(tpm, session, handle);
    return 'gone';
  }
  const { attributes, authPolicy, dataSize } = index.nvPublic.value;
  const shape = { attributes: attributes & ~N.WRITTEN, authPolicy, dataSize };
  if (writtenEntity(handle, shape).name.toString('hex') !== name) {
    await proveName(tpm, session, index);
    return 'other';
  }
  const authHandle = withSession(owner, session);
  try {
    if ((attributes & NV_TYPE) === 0) {
      // Undefining frees the space; only writing makes the chip replace what was in it.
      await tpm.run(NV_Write, { authHandle, nvIndex: index }, { data: randomBytes(dataSize), offset: 0 });
      index = writtenEntity(handle, shape);
      barrier('index.overwritten');
    }
    await tpm.run(NV_UndefineSpace, { authHandle, nvIndex: index }, {});
  } catch (error) {
    explainOwner(error);
  }
  return 'removed';
}

/** An error carries no HMAC, so that anybody on the bus can say that nothing is there. A list carries one. */
async function proveAbsence(tpm: Tpm, session: Session, handle: number): Promise<void> {
  const found = await listHandles(tpm, Ht.NV_INDEX, [session]);
  if (found.includes(handle)) throw changedOnItsWay(handle);
}

/** The Name of a handle goes into the HMACs of command and answer: with another the TPM refuses. */
async function proveName(tpm: Tpm, session: Session, nvIndex: NvEntity): Promise<void> {
  try {
    await tpm.run(NV_ReadPublic, { nvIndex }, {}, [session]);
  } catch (cause) {
    throw TpmError.is(cause, Rc.AUTH_FAIL, Rc.BAD_AUTH) ? changedOnItsWay(nvIndex.handle, cause) : cause;
  }
}

function changedOnItsWay(handle: number, cause?: unknown): ManagerError {
  return new ManagerError(
    'tpm-fault',
    `what the TPM says of the NV index ${hexHandle(handle)} is not so: something between it and the manager changes its ` +
      'answers. The index may still be there; look at what is connected to the TPM, then try again',
    { cause },
  );
}

/** For an enrolment that fails: best effort, the failure itself is what the caller reports. */
export async function removeQuietly(
  tpm: Tpm,
  session: Session,
  owner: Entity,
  refs: readonly NvIndexRef[],
): Promise<void> {
  for (const ref of refs) {
    await removeIndex(tpm, session, owner, ref).catch((error: unknown) => {
      if (!(error instanceof TpmError || error instanceof ManagerError)) throw error;
    });
  }
}

export function whereIs({ handle }: NvIndexRef): string {
  return `the NV index ${hexHandle(handle)}`;
}

function publicOf(handle: number, shape: NvShape, state: number): Embedded<NvPublic> {
  return embed(tpmsNvPublic, {
    nvIndex: handle,
    nameAlg: Alg.SHA256,
    attributes: (shape.attributes | state) >>> 0,
    authPolicy: shape.authPolicy,
    dataSize: shape.dataSize,
  });
}
