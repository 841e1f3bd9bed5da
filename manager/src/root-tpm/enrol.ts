import { inSession, type ObjectEntity, permanent, Rh, type Tpm } from 'tpm2-ts-bindings';
import { ManagerError } from '../error.js';
import {
  checkEnrolmentFormat,
  type NvIndexRef,
  type RootTpmEnrolment,
  type RootTpmLocation,
  readSelection,
  SECRET_BYTES,
} from './enrolment.js';
import {
  type BeforeDefine,
  makeGeneration,
  type NewGeneration,
  proveGeneration,
  resolvePolicy,
} from './generation.js';
import { anchorShape, makeCounter, orderlyCountOf, REVOCATION_SHAPE } from './nv-counter.js';
import { nvHalfShape } from './nv-half.js';
import { indicesInRange, planIndices, removeQuietly } from './nv-index.js';
import { enrolledSrk, findOrCreateSrk, removeSrk } from './srk.js';
import { identify } from './start.js';

export interface EnrolOptions {
  /** 16 bytes; the root key is another one for each installation. */
  installation: Uint8Array;
  pcrSelection: string;
  srkHandle: number;
  /** 32 bytes, random: what counts and reads the anchor counter, for as long as the installation lives. */
  anchorAuth: Uint8Array;
  /** The anchor counter is kept in the chip's RAM between orderly shutdowns. Needs a TPM with such counters. */
  orderly?: boolean;
  ownerAuth?: Uint8Array;
  beforeDefine?: BeforeDefine;
}

export interface RecreateOptions {
  readonly ownerAuth?: Uint8Array;
  readonly beforeDefine?: BeforeDefine;
}

export interface Enrolled extends NewGeneration {
  /** NV indices like those that were made, there before: nothing is done with them. */
  readonly leftovers: readonly number[];
}

export async function enrol(tpm: Tpm, location: RootTpmLocation, options: EnrolOptions): Promise<Enrolled> {
  if (options.installation.length !== 16)
    throw new ManagerError('bad-request', 'the installation id has 16 bytes');
  checkAnchorAuth(options.anchorAuth);
  readSelection(options.pcrSelection);
  const orderlyCount = options.orderly ? await orderlyCountOf(tpm) : 0;
  const ownerAuth = options.ownerAuth ?? new Uint8Array(0);
  const leftovers = await indicesInRange(tpm);
  const { srk, created } = await findOrCreateSrk(tpm, options.srkHandle, ownerAuth);
  const made: NvIndexRef[] = [];
  try {
    const parent = { srk, created, ownerAuth, orderlyCount };
    const { enrolment, inputs } = await enrolUnder(tpm, location, options, parent, made);
    return { ...(await proveGeneration(tpm, enrolment, inputs, [])), leftovers };
  } catch (error) {
    const owner = permanent(Rh.OWNER, ownerAuth);
    await inSession(tpm, { kind: 'hmac', encrypt: 'in', salt: srk }, (session) =>
      removeQuietly(tpm, session, owner, made),
    ).catch(() => undefined);
    if (created) await removeSrk(tpm, srk, ownerAuth);
    throw error;
  }
}

interface Parent {
  readonly srk: ObjectEntity;
  readonly created: boolean;
  readonly ownerAuth: Uint8Array;
  readonly orderlyCount: number;
}

/** @param made what is to be taken out again where this fails */
async function enrolUnder(
  tpm: Tpm,
  location: RootTpmLocation,
  options: EnrolOptions,
  { srk, created, ownerAuth, orderlyCount }: Parent,
  made: NvIndexRef[],
): Promise<{ enrolment: RootTpmEnrolment; inputs: Buffer }> {
  const identity = await identify(tpm);
  const owner = permanent(Rh.OWNER, ownerAuth);
  const installation = Buffer.from(options.installation).toString('hex');
  return inSession(tpm, { kind: 'hmac', encrypt: 'both', salt: srk }, async (session) => {
    const { pcrSelection, anchorAuth } = options;
    const counters = { anchor: anchorShape(orderlyCount > 0), revocation: REVOCATION_SHAPE };
    const { anchor, revocation } = await planIndices(tpm, counters);
    const base = { installation, revocation: revocation.ref };
    const resolved = await resolvePolicy(tpm, session, base, { kind: 'fixed', pcrSelection });
    const halfShape = nvHalfShape(Buffer.from(resolved.policyDigest, 'hex'));
    const { half } = await planIndices(tpm, { half: halfShape }, [anchor.ref, revocation.ref]);
    const refs = [half.ref, anchor.ref, revocation.ref];
    await options.beforeDefine?.(refs);
    made.push(...refs);
    await makeCounter(tpm, session, owner, anchor, { auth: anchorAuth });
    await makeCounter(tpm, session, owner, revocation, 'owner');
    const { root, inputs } = await makeGeneration(tpm, session, { srk, owner }, 1, resolved, half);
    const enrolment: RootTpmEnrolment = {
      format: 2,
      ...location,
      installation,
      ...identity,
      srkHandle: options.srkHandle,
      srkName: srk.name.toString('hex'),
      srkCreatedByUs: created,
      anchor: { ...anchor.ref, orderlyCount },
      revocation: revocation.ref,
      root,
    };
    return { enrolment, inputs };
  });
}

/**
 * A new anchor counter, for who knowingly gives up what the last one said. It begins above every value that a counter of
 * this chip ever had.
 */
export async function recreateAnchorCounter(
  tpm: Tpm,
  enrolment: RootTpmEnrolment,
  anchorAuth: Uint8Array,
  { ownerAuth, beforeDefine }: RecreateOptions,
): Promise<RootTpmEnrolment> {
  checkEnrolmentFormat(enrolment);
  checkAnchorAuth(anchorAuth);
  const { orderlyCount } = enrolment.anchor;
  const srk = await enrolledSrk(tpm, enrolment);
  const owner = permanent(Rh.OWNER, ownerAuth);
  return inSession(tpm, { kind: 'hmac', encrypt: 'both', salt: srk }, async (session) => {
    const { anchor } = await planIndices(tpm, { anchor: anchorShape(orderlyCount > 0) });
    await beforeDefine?.([anchor.ref]);
    try {
      await makeCounter(tpm, session, owner, anchor, { auth: anchorAuth });
    } catch (error) {
      await removeQuietly(tpm, session, owner, [anchor.ref]);
      throw error;
    }
    return { ...enrolment, anchor: { ...anchor.ref, orderlyCount } };
  });
}

export function checkAnchorAuth(anchorAuth: Uint8Array): void {
  if (anchorAuth.length !== SECRET_BYTES) {
    throw new ManagerError('bad-request', `the anchor counter's secret has ${SECRET_BYTES} bytes`);
  }
}
