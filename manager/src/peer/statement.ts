import {
  Alg,
  type AttestOf,
  decode,
  formatPcrSelection,
  type PcrValues,
  type Public,
  type Signature,
  type St,
  TpmError,
  tpmtSignature,
} from 'tpm2-ts-bindings';
import type { Peer } from 'vtpm-proto';
import { ManagerError } from '../error.js';
import { readSelection } from '../root-tpm/enrolment.js';
import { acceptAttestationKey } from './attestation-key.js';

/** What the TPM of another host signed, and what two such statements have in common. */

/** How often a TPM was reset and restarted. It hides the numbers behind one of the signing key: compare, do not read. */
export interface BootCounts {
  readonly resetCount: number;
  readonly restartCount: number;
}

/** A platform that its TPM vouches for. */
export interface Platform {
  /** As `oneSelection` has it. */
  readonly pcrSelection: string;
  readonly pcrs: PcrValues;
  /** SHA-256 over the values, as PolicyPCR and the quote have it. */
  readonly pcrDigest: Buffer;
  readonly boot: BootCounts;
}

/** The one way to write a selection of registers. @throws ManagerError `bad-request` */
export function oneSelection(text: string): string {
  return formatPcrSelection(readSelection(text));
}

/** A host with the key that its TPM signs with. */
export type WithKey = Pick<Peer, 'name' | 'attestationKey'>;

/**
 * Two statements of one TPM in one session: a host that was started again in between has other software, and nothing that
 * it said before counts.
 * @throws ManagerError `peer-restarted`
 */
export function requireSameBoot(peer: Pick<Peer, 'name'>, first: BootCounts, second: BootCounts): void {
  if (first.resetCount === second.resetCount && first.restartCount === second.restartCount) return;
  throw new ManagerError(
    'peer-restarted',
    `the host "${peer.name}" was started again between two of its statements: what it showed before does not count. ` +
      'Begin the migration again',
  );
}

/** The key that a statement has to be by, and its signature, read. @throws ManagerError `peer-unattested`, `peer-ak` */
export function statementBy(peer: WithKey, bytes: Uint8Array): { key: Public; signature: Signature } {
  if (peer.attestationKey.length === 0) {
    throw unattested(
      peer,
      'no attestation key of it is enrolled. Take its vtpmctl peer identity here once more',
    );
  }
  const key = acceptAttestationKey(peer.attestationKey);
  const signature = attested(peer, () => decode(tpmtSignature, bytes, 'signature'));
  if (signature.sigAlg !== Alg.ECDSA || signature.hash !== Alg.SHA256) {
    throw unattested(peer, 'a signature of another kind than its attestation key makes');
  }
  return { key, signature };
}

/** Runs what refuses a statement; comes out as `peer-unattested`. */
export function attested<T>(peer: Pick<Peer, 'name'>, body: () => T): T {
  try {
    return body();
  } catch (error) {
    const isRefusal =
      error instanceof TpmError || (error instanceof ManagerError && error.code === 'bad-request');
    if (!isRefusal) throw error;
    throw unattested(peer, error.message, error);
  }
}

export function bootOf({ clockInfo }: Pick<AttestOf<typeof St.ATTEST_QUOTE>, 'clockInfo'>): BootCounts {
  return { resetCount: clockInfo.resetCount, restartCount: clockInfo.restartCount };
}

function unattested(peer: Pick<Peer, 'name'>, why: string, cause?: unknown): ManagerError {
  return new ManagerError(
    'peer-unattested',
    `the host "${peer.name}" did not prove its platform for this session: ${why}. Try again; where it stays so, ` +
      'something changes or replays what it says, or its TPM is another one: enrol it anew',
    { cause },
  );
}
