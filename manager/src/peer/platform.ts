import { type Approval, decode, u64, verifyNvCertify } from 'tpm2-ts-bindings';
import type { Evidence, Peer } from 'vtpm-proto';
import { ManagerError } from '../error.js';
import { isApproved } from '../root-tpm/index.js';
import { REVOCATION_SHAPE } from '../root-tpm/nv-counter.js';
import { writtenEntity } from '../root-tpm/nv-index.js';
import { attested, bootOf, oneSelection, type Platform, requireSameBoot, statementBy } from './statement.js';

/** Which platforms another host may have: values that an operator approved here, or its policy authority anywhere. */

/** A host sends those that are good for it now; more are no evidence but a load. */
const MAX_APPROVALS = 64;
const INSTALLATION_BYTES = 16;

type Approving = Pick<
  Peer,
  'name' | 'attestationKey' | 'platforms' | 'policyAuthority' | 'installation' | 'revocationHandle'
>;
type Approvals = Pick<Evidence, 'approvals' | 'revocationAttest' | 'revocationSignature'>;

/**
 * Whether a platform is approved for the host that showed it.
 * @param evidence of the same statement: the authority's approvals, and the revocation counter as the TPM certified it
 * @returns for people: which approval it was
 * @throws ManagerError `peer-platform`, `approval-stale`, `peer-unattested`, `peer-restarted`
 */
export function checkPlatform(
  peer: Approving,
  platform: Platform,
  evidence: Approvals,
  transcript: Uint8Array,
): string {
  const here = peer.platforms.find(
    ({ pcrSelection, pcrDigest }) => isSame(pcrSelection, platform) && platform.pcrDigest.equals(pcrDigest),
  );
  if (here !== undefined) return `approved here on ${new Date(Number(here.approvedAt)).toISOString()}`;
  if (peer.policyAuthority !== '') return checkAuthority(peer, platform, evidence, transcript);
  throw unapproved(
    peer,
    platform,
    peer.platforms.length === 0 ? 'no platform is approved for it' : 'another one is',
  );
}

function checkAuthority(
  peer: Approving,
  platform: Platform,
  evidence: Approvals,
  transcript: Uint8Array,
): string {
  const counter = certifiedCounter(peer, platform, evidence, transcript);
  const approvals = approvalsOf(peer, evidence.approvals).filter(
    ({ pcrSelection, pcrs }) =>
      isSame(pcrSelection, platform) &&
      Object.entries(platform.pcrs).every(([name, value]) => pcrs[name] === value),
  );
  const now = approvals.find((approval) => BigInt(approval.counter) === counter);
  if (now !== undefined) return `approved by its policy authority as "${now.label}"`;
  const [first] = approvals;
  if (first === undefined) throw unapproved(peer, platform, 'no approval of its policy authority is for it');
  const newest = approvals.reduce((a, b) => (BigInt(b.counter) > BigInt(a.counter) ? b : a), first);
  if (BigInt(newest.counter) > counter) {
    throw unapproved(
      peer,
      platform,
      `the approval "${newest.label}" is for after a revocation that was not finished`,
    );
  }
  throw new ManagerError(
    'approval-stale',
    `the approval "${newest.label}" of the platform of the host "${peer.name}" was revoked. Approve it again there: ` +
      'vtpmctl platform approve',
  );
}

/** However it is written. */
function isSame(pcrSelection: string, platform: Platform): boolean {
  try {
    return oneSelection(pcrSelection) === platform.pcrSelection;
  } catch (error) {
    if (error instanceof ManagerError) return false;
    throw error;
  }
}

/** The revocation counter as it is now: without it an approval says nothing, as it may have been revoked. */
function certifiedCounter(
  peer: Approving,
  platform: Platform,
  { revocationAttest, revocationSignature }: Approvals,
  transcript: Uint8Array,
): bigint {
  if (revocationAttest.length === 0) {
    throw unapproved(peer, platform, 'it does not show which approvals of its policy authority were revoked');
  }
  const { key, signature } = statementBy(peer, revocationSignature);
  const { name } = writtenEntity(peer.revocationHandle, REVOCATION_SHAPE);
  const nv = attested(peer, () =>
    verifyNvCertify(Buffer.from(revocationAttest), signature, { key, nonce: transcript, name }),
  );
  requireSameBoot(peer, platform.boot, bootOf(nv));
  return attested(peer, () => decode(u64, nv.attested.nvContents, 'revocation counter'));
}

/** Those of the authority for this host. */
function approvalsOf(peer: Approving, sent: readonly Uint8Array[]): Approval[] {
  if (sent.length > MAX_APPROVALS) {
    throw new ManagerError(
      'peer-platform',
      `the host "${peer.name}" sends more than ${MAX_APPROVALS} approvals; those that are good for it now are enough`,
    );
  }
  if (peer.installation.length !== INSTALLATION_BYTES) return [];
  const { name } = writtenEntity(peer.revocationHandle, REVOCATION_SHAPE);
  const installed = {
    installation: Buffer.from(peer.installation).toString('hex'),
    revocation: { handle: peer.revocationHandle, name: name.toString('hex') },
  };
  return sent.flatMap((bytes) => {
    const approval = parsed(bytes);
    return isApproved(installed, peer.policyAuthority, approval) ? [approval] : [];
  });
}

function parsed(bytes: Uint8Array): unknown {
  try {
    return JSON.parse(Buffer.from(bytes).toString('utf8'));
  } catch {
    return undefined;
  }
}

function unapproved(
  peer: Pick<Peer, 'name'>,
  { pcrSelection, pcrDigest }: Platform,
  why: string,
): ManagerError {
  return new ManagerError(
    'peer-platform',
    `the platform of the host "${peer.name}" is not approved: ${why}. Where the state that its registers are in is one you ` +
      `trust: vtpmctl peer approve ${peer.name} --pcrs ${pcrSelection}=${pcrDigest.toString('hex')}`,
  );
}
