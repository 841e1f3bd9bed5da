import { timingSafeEqual } from 'node:crypto';
import {
  Alg,
  type Approval,
  Create,
  concat,
  type Entity,
  inSession,
  type ObjectEntity,
  type PcrValues,
  type PublicArea,
  parsePcrSelection,
  pcrDigest,
  permanent,
  policyDigest,
  Rc,
  Rh,
  type Session,
  sealedTemplate,
  type Tpm,
  TpmError,
  wipe,
  withSession,
} from 'tpm2-ts-bindings';
import { barrier } from 'vtpm-common';
import { ManagerError } from '../error.js';
import { authorityPolicy, readAuthority } from './approvals.js';
import {
  checkEnrolmentFormat,
  type GenerationPolicy,
  type NvIndexRef,
  type RootGeneration,
  type RootTpmEnrolment,
} from './enrolment.js';
import { nvHalfShape, writeNvHalf } from './nv-half.js';
import { type PlannedIndex, planIndices, type Removal, removeIndex, removeQuietly } from './nv-index.js';
import { readPcrState } from './platform-state.js';
import { releaseRootKey } from './release.js';
import { mixedRandom, rootKeyFromInputs } from './root-key.js';
import { sealedFlaw } from './sealed.js';
import { enrolledSrk, unfit } from './srk.js';

/** What a new generation is to be released by. */
export type PolicyChoice =
  | { readonly kind: 'fixed'; readonly pcrSelection: string }
  | {
      readonly kind: 'authority';
      /** PEM of the public key. */
      readonly authority: string;
      /** Of the approvals that count; the policy itself takes any. */
      readonly pcrSelection: string;
    };

/** Called before anything is put into the TPM: write it down, so that a crash leaves nothing that nobody knows of. */
export type BeforeDefine = (indices: readonly NvIndexRef[]) => void | Promise<void>;

export interface NextGenerationOptions {
  /** The same as that of the generation before, unless given. */
  readonly policy?: PolicyChoice;
  /** Under an authority: one of them has to be good now, as the generation is proved by releasing it. */
  readonly approvals?: readonly Approval[];
  readonly ownerAuth?: Uint8Array;
  readonly beforeDefine?: BeforeDefine;
}

/** A root key and what to keep of it. The caller wipes both buffers. */
export interface NewGeneration {
  readonly enrolment: RootTpmEnrolment;
  /** 32 bytes. */
  readonly rootKey: Buffer;
  /** What the root key is made of, 64 bytes, to be boxed to the recovery key: `rootKeyFromInputs`. */
  readonly recoveryInputs: Buffer;
}

/** A policy with all that is kept of it. */
export type ResolvedPolicy = Pick<RootGeneration, 'policy' | 'pcrSelection' | 'policyDigest' | 'pcrValues'>;

/** Fixes what a choice means now. Reads the PCRs in answers that nobody on the bus can change. */
export async function resolvePolicy(
  tpm: Tpm,
  session: Session,
  enrolment: Pick<RootTpmEnrolment, 'installation' | 'revocation'>,
  choice: PolicyChoice,
): Promise<ResolvedPolicy> {
  const { pcrSelection } = choice;
  const pcrValues = await readPcrState(tpm, pcrSelection, session);
  const policy: GenerationPolicy =
    choice.kind === 'fixed'
      ? { kind: 'fixed' }
      : { kind: 'authority', authority: readAuthority(choice.authority) };
  const digest =
    policy.kind === 'fixed'
      ? fixedPolicy(pcrSelection, pcrValues)
      : authorityPolicy(enrolment, policy.authority);
  return { policy, pcrSelection, policyDigest: digest.toString('hex'), pcrValues };
}

/** The authPolicy of what only these register values give out, 32 bytes. */
export function fixedPolicy(pcrSelection: string, values: PcrValues): Buffer {
  const digest = pcrDigest(
    Alg.SHA256,
    Object.values(values).map((value) => Buffer.from(value, 'hex')),
  );
  return policyDigest([{ assert: 'pcr', selection: parsePcrSelection(pcrSelection), digest }]);
}

/** Puts a new secret under the SRK and a new half into the planned index. @returns with the inputs, which the caller wipes */
export async function makeGeneration(
  tpm: Tpm,
  session: Session,
  under: { readonly srk: ObjectEntity; readonly owner: Entity },
  generation: number,
  resolved: ResolvedPolicy,
  planned: PlannedIndex,
): Promise<{ readonly root: RootGeneration; readonly inputs: Buffer }> {
  const authPolicy = Buffer.from(resolved.policyDigest, 'hex');
  const rootSecret = await mixedRandom(tpm, session);
  const nvHalf = await mixedRandom(tpm, session);
  try {
    const sealed = await seal(tpm, session, under.srk, authPolicy, rootSecret);
    await writeNvHalf(tpm, session, under.owner, planned, nvHalf);
    const root: RootGeneration = {
      generation,
      ...resolved,
      sealedPublic: sealed.publicArea.bytes.toString('base64'),
      sealedPrivate: sealed.privateArea.toString('base64'),
      nvHandle: planned.ref.handle,
      nvName: planned.ref.name,
    };
    return { root, inputs: concat(rootSecret, nvHalf) };
  } finally {
    wipe(rootSecret, nvHalf);
  }
}

/** A key that cannot be released again must not be used: better to fail now than at the next start. Takes `inputs`. */
export async function proveGeneration(
  tpm: Tpm,
  enrolment: RootTpmEnrolment,
  inputs: Buffer,
  approvals: readonly Approval[],
): Promise<NewGeneration> {
  const rootKey = rootKeyFromInputs(inputs, Buffer.from(enrolment.installation, 'hex'));
  let released: Buffer | undefined;
  try {
    released = await releaseRootKey(tpm, enrolment, approvals);
    if (released.length !== rootKey.length || !timingSafeEqual(released, rootKey)) {
      throw new ManagerError('tpm-fault', 'the TPM gave back another secret than it was given');
    }
    return { enrolment, rootKey, recoveryInputs: inputs };
  } catch (error) {
    wipe(rootKey, inputs);
    throw error;
  } finally {
    wipe(released);
  }
}

export async function nextGeneration(
  tpm: Tpm,
  enrolment: RootTpmEnrolment,
  { policy, approvals = [], ownerAuth = new Uint8Array(0), beforeDefine }: NextGenerationOptions,
): Promise<NewGeneration> {
  checkEnrolmentFormat(enrolment);
  const choice = policy ?? samePolicy(enrolment.root);
  const srk = await enrolledSrk(tpm, enrolment);
  const owner = permanent(Rh.OWNER, ownerAuth);
  const salted = { kind: 'hmac', encrypt: 'both', salt: srk } as const;
  const made: NvIndexRef[] = [];
  try {
    const { root, inputs } = await inSession(tpm, salted, async (session) => {
      const resolved = await resolvePolicy(tpm, session, enrolment, choice);
      const { half } = await planIndices(tpm, {
        half: nvHalfShape(Buffer.from(resolved.policyDigest, 'hex')),
      });
      await beforeDefine?.([half.ref]);
      barrier('rotation.planned');
      made.push(half.ref);
      const generation = enrolment.root.generation + 1;
      return makeGeneration(tpm, session, { srk, owner }, generation, resolved, half);
    });
    return await proveGeneration(tpm, { ...enrolment, root }, inputs, approvals);
  } catch (error) {
    if (made.length > 0) {
      await inSession(tpm, salted, (session) => removeQuietly(tpm, session, owner, made)).catch(
        () => undefined,
      );
    }
    throw error;
  }
}

function samePolicy({ policy, pcrSelection }: RootGeneration): PolicyChoice {
  return { ...policy, pcrSelection };
}

/**
 * Overwrites and removes indices that are no longer needed. Can be repeated.
 * @throws ManagerError `bad-request` for one that the enrolment needs
 */
export async function eraseIndices(
  tpm: Tpm,
  enrolment: RootTpmEnrolment,
  refs: readonly NvIndexRef[],
  ownerAuth: Uint8Array,
): Promise<Removal[]> {
  checkEnrolmentFormat(enrolment);
  const { root, anchor, revocation } = enrolment;
  const needed = new Set([root.nvName, anchor.name, revocation.name]);
  if (refs.some(({ name }) => needed.has(name))) {
    throw new ManagerError('bad-request', 'this NV index is needed by the enrolment that stays');
  }
  const srk = await enrolledSrk(tpm, enrolment);
  const owner = permanent(Rh.OWNER, ownerAuth);
  return inSession(tpm, { kind: 'hmac', encrypt: 'in', salt: srk }, async (session) => {
    const removals: Removal[] = [];
    for (const ref of refs) removals.push(await removeIndex(tpm, session, owner, ref));
    return removals;
  });
}

async function seal(
  tpm: Tpm,
  session: Session,
  srk: ObjectEntity,
  authPolicy: Buffer,
  secret: Buffer,
): Promise<{ publicArea: PublicArea; privateArea: Buffer }> {
  const nothing = Buffer.alloc(0);
  try {
    const sealed = await tpm.run(
      Create,
      { parentHandle: withSession(srk, session) },
      {
        inSensitive: { userAuth: nothing, data: secret },
        inPublic: sealedTemplate(authPolicy),
        outsideInfo: nothing,
        creationPCR: [],
      },
    );
    const flaw = sealedFlaw(sealed.outPublic, authPolicy);
    if (flaw !== undefined) throw new ManagerError('tpm-fault', `the TPM sealed something else: ${flaw}`);
    return { publicArea: sealed.outPublic, privateArea: sealed.outPrivate };
  } catch (error) {
    if (!TpmError.is(error, Rc.AUTH_FAIL, Rc.BAD_AUTH)) throw error;
    throw unfit(srk.handle, 'it has a password', error);
  }
}
