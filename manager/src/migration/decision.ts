import { bytesEqual, type MigrationDecision, type SignedDecision } from 'vtpm-proto';
import { ManagerError } from '../error.js';
import { verifiedDecision } from '../ownership/decisions.js';

/** Everything that a decision is about. */
export type DecisionNames = Omit<MigrationDecision, 'format' | 'verdict'>;

/**
 * What the destination decided of this very migration. Its host id is its key, and stands in the source's own record.
 * @throws ManagerError `decision-forged` where it is of another host, or of another migration, vTPM, epoch or generation;
 * `newer-format`
 */
export function checkDecision(signed: SignedDecision, names: DecisionNames): MigrationDecision {
  const decision = verified(signed, names.destination);
  for (const [what, field] of [
    ['migration', 'migrationId'],
    ['source', 'source'],
    ['vTPM', 'vtpmUuid'],
  ] as const) {
    if (!bytesEqual(decision[field], names[field])) throw forged(`it names another ${what}`);
  }
  for (const field of ['epoch', 'generation'] as const) {
    if (decision[field] !== names[field]) {
      throw forged(`it names ${field} ${decision[field]}, and not ${names[field]}`);
    }
  }
  return decision;
}

function verified(signed: SignedDecision, destination: Uint8Array): MigrationDecision {
  try {
    return verifiedDecision(destination, signed);
  } catch (error) {
    const { code, message } = ManagerError.from(error);
    throw code === 'bad-request' ? forged(message) : error;
  }
}

function forged(what: string): ManagerError {
  return new ManagerError(
    'decision-forged',
    `this is no decision about the migration: ${what}; the vTPM stays frozen until there is one`,
  );
}
