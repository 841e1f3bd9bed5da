import {
  bytesEqual,
  decode,
  encode,
  type MigrationDecision,
  ProtoError,
  type SignedDecision,
  type SigningKey,
  verifySignature,
} from 'vtpm-proto';
import { ManagerError } from '../error.js';

/** Format number of decisions; another one is refused by name. */
export const DECISION_FORMAT = 1;

export const DECISION_DOMAIN = Buffer.from('vtpm.v1 migration decision\0');

/** @param hostKey of the destination, which alone decides */
export function signDecision(hostKey: SigningKey, facts: Omit<MigrationDecision, 'format'>): SignedDecision {
  const decision = encode('MigrationDecision', { format: DECISION_FORMAT, ...facts });
  return { decision, signature: hostKey.sign(Buffer.concat([DECISION_DOMAIN, decision])) };
}

/**
 * What the destination decided.
 * @param destination its host id, 32 bytes
 * @throws ManagerError `bad-request` where it did not sign that, `newer-format`
 */
export function verifiedDecision(destination: Uint8Array, signed: SignedDecision): MigrationDecision {
  const { decision: bytes, signature } = signed;
  if (!verifySignature(destination, Buffer.concat([DECISION_DOMAIN, bytes]), signature)) {
    throw new ManagerError('bad-request', 'the decision is not signed by the destination');
  }
  try {
    const decision = decode('MigrationDecision', bytes);
    if (decision.format > DECISION_FORMAT) {
      throw new ManagerError(
        'newer-format',
        `the decision has format ${decision.format}, this version knows ${DECISION_FORMAT}; upgrade this host`,
      );
    }
    if (decision.format !== DECISION_FORMAT || !bytesEqual(decision.destination, destination)) {
      throw new ManagerError(
        'bad-request',
        "the decision is another host's, or of a format that there is not",
      );
    }
    return decision;
  } catch (error) {
    if (!(error instanceof ProtoError)) throw error;
    throw new ManagerError('bad-request', `the decision is not readable: ${error.message}`, { cause: error });
  }
}
