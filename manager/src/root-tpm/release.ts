import {
  type Approval,
  flush,
  inSession,
  Load,
  NV_Read,
  type NvEntity,
  type ObjectEntity,
  objectEntity,
  type PolicyStep,
  Rc,
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
import { approvalsFor, approvedSteps, authorityPolicy, explainFixed } from './approvals.js';
import { checkEnrolmentFormat, type RootTpmEnrolment, readSelection, SECRET_BYTES } from './enrolment.js';
import { enrolledRevocation, readCounter, stateOf } from './nv-counter.js';
import { nvHalfShape } from './nv-half.js';
import { whereIs, writtenEntity } from './nv-index.js';
import { readPcrState } from './platform-state.js';
import { deriveRootKey } from './root-key.js';
import { readSealedPublic, sealedFlaw } from './sealed.js';
import { enrolledSrk, WITHOUT_TPM } from './srk.js';

/** Something, a kernel's measurement log for instance, may extend a PCR between policy and use: then once more. */
const POLICY_ATTEMPTS = 5;

/** @param approvals of the authority, where the generation has one */
export async function releaseRootKey(
  tpm: Tpm,
  enrolment: RootTpmEnrolment,
  approvals: readonly Approval[],
): Promise<Buffer> {
  checkEnrolmentFormat(enrolment);
  const { root } = enrolment;
  const authPolicy = Buffer.from(root.policyDigest, 'hex');
  const sealedPublic = readSealedPublic(root.sealedPublic);
  const flaw = sealedFlaw(sealedPublic, authPolicy) ?? policyFlaw(enrolment, authPolicy);
  if (flaw !== undefined) {
    throw new ManagerError('tpm-fault', `the enrolled sealed object is not acceptable: ${flaw}`);
  }
  // Before anything is salted to the key: whoever sits on the bus could offer one of his own.
  const srk = await enrolledSrk(tpm, enrolment);
  const index = await enrolledHalf(tpm, enrolment, authPolicy);
  const platform = await platformOf(tpm, enrolment, approvals);

  return inSession(tpm, { kind: 'policy', encrypt: 'both', salt: srk }, async (session) => {
    const sealed = await load(tpm, session, srk, enrolment, objectEntity(0, sealedPublic));
    let rootSecret: Buffer | undefined;
    let nvHalf: Buffer | undefined;
    try {
      rootSecret = await underPolicy(tpm, session, platform, async () => {
        const { outData } = await tpm.run(Unseal, { itemHandle: withSession(sealed, session) }, {});
        return outData;
      });
      nvHalf = await underPolicy(tpm, session, platform, async () => {
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

function policyFlaw(enrolment: RootTpmEnrolment, authPolicy: Buffer): string | undefined {
  const { policy } = enrolment.root;
  if (policy.kind === 'fixed') return undefined;
  try {
    if (authorityPolicy(enrolment, policy.authority).equals(authPolicy)) return undefined;
    return 'its policy is not that of the authority';
  } catch (error) {
    return `its authority is none (${(error as Error).message})`;
  }
}

async function enrolledHalf(tpm: Tpm, { root }: RootTpmEnrolment, authPolicy: Buffer): Promise<NvEntity> {
  const ref = { handle: root.nvHandle, name: root.nvName };
  const wanted = writtenEntity(root.nvHandle, nvHalfShape(authPolicy));
  if (wanted.name.toString('hex') !== root.nvName) {
    throw new ManagerError('tpm-fault', 'the TPM enrolment is damaged; restore it from a backup');
  }
  const found = await stateOf(tpm, ref);
  if (found === 'fit') return wanted;
  const where = `${whereIs(ref)}, which holds a half of the root key,`;
  throw found === 'absent'
    ? new ManagerError(
        'tpm-emptied',
        `${where} is gone: it was removed or the TPM was cleared. What is sealed to it cannot be opened again. ${WITHOUT_TPM}`,
      )
    : new ManagerError(
        'tpm-changed',
        `${where} was made anew with other properties. What is sealed to it cannot be opened again. ${WITHOUT_TPM}`,
      );
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
      { inPrivate: Buffer.from(enrolment.root.sealedPrivate, 'base64'), inPublic: expected.publicArea },
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

/** How the policy of a generation is satisfied. */
interface Platform {
  /** Lists of steps to try, one after the other. @throws ManagerError `platform-policy` where none can succeed now */
  ways(): Promise<readonly (readonly PolicyStep[])[]>;
  /** The refusal, where the chip refused each of them. */
  refusal(cause: unknown): Promise<ManagerError>;
}

async function platformOf(
  tpm: Tpm,
  enrolment: RootTpmEnrolment,
  approvals: readonly Approval[],
): Promise<Platform> {
  const { pcrSelection, policy } = enrolment.root;
  if (policy.kind === 'fixed') {
    return {
      ways: async () => [[{ assert: 'pcr', selection: readSelection(pcrSelection) }]],
      refusal: async (cause) => {
        const now = await readPcrState(tpm, pcrSelection);
        return new ManagerError('platform-policy', explainFixed(enrolment.root, now), { cause });
      },
    };
  }
  const { authority } = policy;
  const counter = await enrolledRevocation(tpm, enrolment);
  return {
    ways: async () => {
      // Hints, to pick an approval and to explain: whoever changes these answers gets another refusal, no key.
      const now = { pcrs: await readPcrState(tpm, pcrSelection), counter: await readCounter(tpm, counter) };
      const found = approvalsFor(enrolment, authority, approvals, now);
      return found.map((approval) => approvedSteps(enrolment, authority, approval));
    },
    refusal: async (cause) =>
      new ManagerError(
        'platform-policy',
        'the TPM refuses the root key although an approval is there for its PCR values: something changes them, or ' +
          'answers of the TPM, on the way. Look for programs that extend PCRs',
        { cause },
      ),
  };
}

/** Satisfies the policy and runs `use`. The chip itself gives the verdict: nothing is decided on the host. */
async function underPolicy<T>(
  tpm: Tpm,
  session: Session,
  platform: Platform,
  use: () => Promise<T>,
): Promise<T> {
  for (let attempt = 1; ; attempt++) {
    let refused: unknown;
    for (const steps of await platform.ways()) {
      try {
        await runPolicy(tpm, session, steps);
        return await use();
      } catch (error) {
        if (!isRefusal(error)) throw error;
        refused = error;
      }
    }
    // A register that moved after the approval was picked shows as a signature of something else.
    const mayHaveMoved = TpmError.is(refused, Rc.PCR_CHANGED, Rc.SIGNATURE, Rc.POLICY);
    if (!mayHaveMoved || attempt === POLICY_ATTEMPTS) throw await platform.refusal(refused);
  }
}

function isRefusal(error: unknown): boolean {
  return TpmError.is(error, Rc.POLICY_FAIL, Rc.VALUE, Rc.PCR_CHANGED, Rc.SIGNATURE, Rc.POLICY, Rc.TICKET);
}
