import {
  Alg,
  formatPcrSelection,
  hashInfo,
  namedPcrs,
  type PcrSelection,
  pcrDigest,
  TpmError,
  verifyQuote,
} from 'tpm2-ts-bindings';
import type { Evidence, Peer } from 'vtpm-proto';
import { readSelection } from '../root-tpm/enrolment.js';
import { checkPlatform } from './platform.js';
import { attested, bootOf, type Platform, statementBy, type WithKey } from './statement.js';

/**
 * What another host's TPM says of its platform, and whether that is one it may have. Pure: no TPM is asked here. What
 * comes from the other host is bytes that it chose; none of them makes this do anything but refuse by name.
 */

/** A platform that is approved of as well. */
export interface PlatformFacts extends Platform {
  /** For people: which approval it was. */
  readonly approvedBy: string;
}

/**
 * Checks a host's evidence: the quote by the attestation key that it was enrolled with, over this transcript; and the
 * platform that it shows against those that are approved for it.
 * @param peer whose AK is known to be in its EK's TPM (`provenAt`, or a challenge that is answered: the caller sees to that)
 * @param transcript 32 bytes: SHA-256 over all that was said, nonces and TLS keys of both ends in it
 * @throws ManagerError `peer-unattested`, `peer-ak`, `peer-platform`, `approval-stale`, `peer-restarted`
 */
export function verifyEvidence(peer: Peer, evidence: Evidence, transcript: Uint8Array): PlatformFacts {
  const platform = readPlatform(peer, evidence, transcript);
  return { ...platform, approvedBy: checkPlatform(peer, platform, evidence, transcript) };
}

/** What the quote says, approved or not. @throws ManagerError `peer-unattested`, `peer-ak` */
export function readPlatform(
  peer: WithKey,
  evidence: Pick<Evidence, 'attest' | 'signature' | 'pcrSelection' | 'pcrValues'>,
  transcript: Uint8Array,
): Platform {
  const { key, signature } = statementBy(peer, evidence.signature);
  return attested(peer, () => {
    const selection = readSelection(evidence.pcrSelection);
    const values = readValues(selection, evidence.pcrValues);
    const expected = { key, nonce: transcript, selection, values };
    const quote = verifyQuote(Buffer.from(evidence.attest), signature, expected);
    return {
      pcrSelection: formatPcrSelection(selection),
      pcrs: namedPcrs(selection, values),
      pcrDigest: pcrDigest(Alg.SHA256, values),
      boot: bootOf(quote),
    };
  });
}

function readValues(selection: PcrSelection, values: readonly Uint8Array[]): Buffer[] {
  const sizes = selection.flatMap(({ hash, pcrs }) => pcrs.map(() => hashInfo(hash)?.size));
  if (values.length !== sizes.length || values.some((value, at) => value.length !== sizes[at])) {
    throw new TpmError('malformed', 'quote: the register values are not those of its selection');
  }
  return values.map((value) => Buffer.from(value));
}
