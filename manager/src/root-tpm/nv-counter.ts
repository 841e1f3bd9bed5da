import {
  decode,
  type Entity,
  NvAttribute as N,
  NV_Increment,
  NV_Read,
  type NvEntity,
  Pt,
  readNvIndex,
  readProperty,
  type Session,
  type Tpm,
  u64,
  withPassword,
  withSession,
} from 'tpm2-ts-bindings';
import { ManagerError } from '../error.js';
import type { NvIndexRef, RootTpmEnrolment } from './enrolment.js';
import {
  checkWritten,
  defineIndex,
  type NvShape,
  type PlannedIndex,
  whereIs,
  writtenEntity,
} from './nv-index.js';

const COUNTER_BYTES = 8;
const NO_POLICY = Buffer.alloc(0);

/** Counted and read with its own authValue only: neither owner nor platform can count it on. */
export function anchorShape(isOrderly: boolean): NvShape {
  return {
    attributes: N.COUNTER | N.AUTHWRITE | N.AUTHREAD | N.NO_DA | (isOrderly ? N.ORDERLY : 0),
    authPolicy: NO_POLICY,
    dataSize: COUNTER_BYTES,
  };
}

/**
 * Counted by the owner, read by everybody: PolicyNV has to read it before anything is released.
 *
 * That whoever has the owner password can count it, or remove it and define another, is a denial of service and no more.
 * A counter never goes down. A new one begins above the highest value that any counter of the chip ever had (Part 3,
 * 31.8, TPM2_NV_Increment), so no value comes back for which an approval was revoked. An index of another type, which
 * could be set to an old value, has other attributes, so another Name, and the Name is in the approved policy.
 * Clearing the TPM takes the chip's primary seed away, and with it what is sealed.
 */
export const REVOCATION_SHAPE: NvShape = {
  attributes: N.COUNTER | N.OWNERWRITE | N.AUTHREAD | N.NO_DA,
  authPolicy: NO_POLICY,
  dataSize: COUNTER_BYTES,
};

/** Defines a counter and counts it once: before that it has no value. @param by what counts it: its own authValue or the owner */
export async function makeCounter(
  tpm: Tpm,
  session: Session,
  owner: Entity,
  planned: PlannedIndex,
  by: { readonly auth: Uint8Array } | 'owner',
): Promise<NvEntity> {
  const auth = by === 'owner' ? undefined : by.auth;
  const nvIndex = await defineIndex(tpm, session, owner, planned, auth);
  const authHandle = withSession(by === 'owner' ? owner : nvIndex, session);
  await tpm.run(NV_Increment, { authHandle, nvIndex }, {});
  return checkWritten(tpm, planned, auth);
}

/**
 * How far ahead an orderly counter may be after a loss of power (TPM_PT_ORDERLY_COUNT).
 * @throws ManagerError `tpm-unfit` where the TPM has no orderly counters
 */
export async function orderlyCountOf(tpm: Tpm): Promise<number> {
  const count = await readProperty(tpm, Pt.ORDERLY_COUNT);
  if (count) return count;
  throw new ManagerError(
    'tpm-unfit',
    'this TPM has no orderly counters; leave the anchor counter a plain one',
  );
}

/** @param session proves the answer; a value that is only a hint needs none */
export async function readCounter(
  tpm: Tpm,
  index: NvEntity,
  sessions: readonly Session[] = [],
): Promise<bigint> {
  const range = { size: COUNTER_BYTES, offset: 0 };
  return decodeCount(
    (await tpm.run(NV_Read, { authHandle: withPassword(index), nvIndex: index }, range, sessions)).data,
  );
}

/** The same with the counter's own authValue. */
export async function readCounterBy(tpm: Tpm, index: NvEntity, session: Session): Promise<bigint> {
  const range = { size: COUNTER_BYTES, offset: 0 };
  const authHandle = withSession(index, session);
  return decodeCount((await tpm.run(NV_Read, { authHandle, nvIndex: index }, range)).data);
}

function decodeCount(data: Buffer): bigint {
  if (data.length !== COUNTER_BYTES)
    throw new ManagerError('tpm-fault', 'the TPM gave a counter of another size');
  return decode(u64, data, 'counter');
}

/** The revocation counter as the enrolment names it, without asking the TPM. */
export function revocationEntity(enrolment: Pick<RootTpmEnrolment, 'revocation'>): NvEntity {
  const entity = writtenEntity(enrolment.revocation.handle, REVOCATION_SHAPE);
  if (entity.name.toString('hex') === enrolment.revocation.name) return entity;
  throw new ManagerError('tpm-fault', 'the TPM enrolment is damaged; restore it from a backup');
}

const ANEW = 'enrol anew with the recovery key: vtpmctl recover --recovery-key-file FILE';

/** @throws ManagerError `tpm-emptied`, `tpm-changed` */
export async function enrolledRevocation(tpm: Tpm, enrolment: RootTpmEnrolment): Promise<NvEntity> {
  const wanted = revocationEntity(enrolment);
  const found = await stateOf(tpm, enrolment.revocation);
  if (found === 'fit') return wanted;
  const where = `${whereIs(enrolment.revocation)}, which counts the revocations of platform approvals,`;
  throw found === 'absent'
    ? new ManagerError(
        'tpm-emptied',
        `${where} is gone: it was removed or the TPM was cleared. No approval counts without it; ${ANEW}`,
      )
    : new ManagerError(
        'tpm-changed',
        `${where} was made anew with other properties. No approval counts with it; ${ANEW}`,
      );
}

export type IndexState = 'fit' | 'absent' | 'changed';

/** Whether an index is there as it was enrolled. */
export async function stateOf(tpm: Tpm, { handle, name }: NvIndexRef): Promise<IndexState> {
  const index = await readNvIndex(tpm, handle);
  if (index === undefined) return 'absent';
  return index.name.toString('hex') === name ? 'fit' : 'changed';
}
