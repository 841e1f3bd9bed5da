import {
  type Approval,
  type ApprovalRequest,
  type ApprovalScope,
  approvalRequest,
  authorityPem,
  authorityPublic,
  authorizeStep,
  type NvEntity,
  type PcrValues,
  type PolicyStep,
  policyDigest,
  readApproval,
  TpmError,
  verifyApproval,
} from 'tpm2-ts-bindings';
import { ManagerError } from '../error.js';
import { type RootGeneration, type RootTpmEnrolment, readSelection } from './enrolment.js';
import { revocationEntity } from './nv-counter.js';

/** Approvals of platform states: how they are asked for, and which of them count now. Pure; no TPM is asked. */

/** Enters each approval's reference: one for the root key is of no use for anything else that is ever approved. */
const PURPOSE = 'vtpm.v1 platform root key';

type Installed = Pick<RootTpmEnrolment, 'installation' | 'revocation'>;

/** What the chip is like now, as far as a policy looks at it. */
export interface PlatformState {
  readonly pcrs: PcrValues;
  /** Of the revocation counter. */
  readonly counter: bigint;
}

/**
 * What the authority is to sign, to be taken to where its key is.
 * @param facts.pcrs the values to approve: those of now, or predicted ones
 * @param facts.counter the revocation counter's value; the next one when survivors are signed before a revocation
 * @throws ManagerError `bad-request`
 */
export function requestApproval(
  enrolment: Installed,
  facts: {
    readonly label: string;
    readonly pcrSelection: string;
    readonly pcrs: PcrValues;
    readonly counter: bigint;
    readonly createdAt: Date;
  },
): ApprovalRequest {
  readSelection(facts.pcrSelection);
  return asked(() =>
    approvalRequest(scopeOf(enrolment), { ...facts, createdAt: facts.createdAt.toISOString() }),
  );
}

/**
 * Whether the authority approved this, for this installation; false for what is no approval. The TPM decides again.
 * @throws ManagerError `bad-request` where the authority is no key
 */
export function isApproved(enrolment: Installed, authority: string, approval: unknown): approval is Approval {
  let read: Approval;
  try {
    read = readApproval(approval);
  } catch {
    return false;
  }
  return asked(() => verifyApproval(read, authority, scopeOf(enrolment)));
}

/** The public half, in the form that is kept. @throws ManagerError `bad-request` */
export function readAuthority(pem: string): string {
  return asked(() => authorityPem(pem));
}

/** The authPolicy of what any approval of the authority gives out, 32 bytes. */
export function authorityPolicy(enrolment: Installed, authority: string): Buffer {
  return policyDigest([
    authorizeStep(
      asked(() => authorityPublic(authority)),
      scopeOf(enrolment),
    ),
  ]);
}

/** The steps that satisfy it. */
export function approvedSteps(
  enrolment: RootTpmEnrolment,
  authority: string,
  approval: Approval,
): PolicyStep[] {
  return [authorizeStep(authorityPublic(authority), scopeOf(enrolment), approval)];
}

/**
 * The approvals that the chip will accept now.
 * @throws ManagerError `platform-policy` where there is none; the message says why and what helps
 */
export function approvalsFor(
  enrolment: RootTpmEnrolment,
  authority: string,
  approvals: readonly Approval[],
  now: PlatformState,
): Approval[] {
  const { pcrSelection } = enrolment.root;
  const known = approvals.filter(
    (approval) => isApproved(enrolment, authority, approval) && approval.pcrSelection === pcrSelection,
  );
  const counts = (approval: Approval): boolean => BigInt(approval.counter) === now.counter;
  const sameValues = known.filter(({ pcrs }) => differing(pcrs, now.pcrs).length === 0);
  const found = sameValues.filter(counts);
  if (found.length > 0) return found;
  throw new ManagerError(
    'platform-policy',
    `the TPM refuses the root key: ${whyNone(known, sameValues, counts, now)}`,
  );
}

function whyNone(
  known: readonly Approval[],
  sameValues: readonly Approval[],
  counts: (approval: Approval) => boolean,
  now: PlatformState,
): string {
  const [same] = sameValues;
  if (same !== undefined) {
    // Compared with the newest: older ones were revoked before it.
    const newest = sameValues.reduce((a, b) => (BigInt(b.counter) > BigInt(a.counter) ? b : a), same);
    return BigInt(newest.counter) < now.counter
      ? `every approval of these PCR values was revoked, the last one "${newest.label}". Approve them again: vtpmctl platform approve`
      : `the approval "${newest.label}" is for after a revocation that was not finished. Finish it: vtpmctl platform revoke`;
  }
  const live = known.filter(counts);
  const candidates = live.length > 0 ? live : known;
  const [first] = candidates;
  if (first === undefined) {
    return 'no approval of the authority for this installation is there. Approve the PCR values of now: vtpmctl platform approve --key FILE --label LABEL';
  }
  const distance = (approval: Approval): number => differing(approval.pcrs, now.pcrs).length;
  const closest = candidates.reduce((a, b) => (distance(b) < distance(a) ? b : a), first);
  const others = candidates.length > 1 ? ` (the closest of ${candidates.length} approvals)` : '';
  return (
    `${explainDifference(closest.pcrs, now.pcrs, `approved as "${closest.label}"`)}${others}. ` +
    'Boot an approved state again, or approve this one: vtpmctl platform approve --key FILE --label LABEL'
  );
}

/** Why a fixed policy is not satisfied. */
export function explainFixed({ pcrSelection, pcrValues }: RootGeneration, now: PcrValues): string {
  const what =
    differing(pcrValues, now).length > 0
      ? explainDifference(pcrValues, now, 'at enrolment')
      : `a PCR of ${pcrSelection} had another value than at enrolment`;
  return (
    `the TPM refuses the root key: ${what}. Boot the enrolled firmware, kernel and settings again; where that cannot be ` +
    'done for good, the recovery key is the way: vtpmctl recover --recovery-key-file FILE. With an authority states are ' +
    'approved before they are booted: vtpmctl platform adopt, once it runs'
  );
}

/** `PCR sha256:7 is 0123…, 4567… approved as "kernel 6.1"` */
function explainDifference(wanted: PcrValues, now: PcrValues, when: string): string {
  return differing(wanted, now)
    .map((name) => `PCR ${name} is ${brief(now[name])} and was ${brief(wanted[name])} ${when}`)
    .join('; ');
}

function differing(wanted: PcrValues, now: PcrValues): string[] {
  return Object.keys(wanted).filter((name) => wanted[name] !== now[name]);
}

function brief(value: string | undefined): string {
  return value === undefined ? 'absent' : `${value.slice(0, 16)}…`;
}

function scopeOf(enrolment: Installed): ApprovalScope & { readonly counter: NvEntity } {
  return {
    purpose: PURPOSE,
    subject: Buffer.from(enrolment.installation, 'hex'),
    counter: revocationEntity(enrolment),
  };
}

/** What an operator gave is to blame. */
function asked<T>(body: () => T): T {
  try {
    return body();
  } catch (error) {
    if (!(error instanceof TpmError)) throw error;
    throw new ManagerError('bad-request', error.message, { cause: error });
  }
}
