import {
  bytesEqual,
  type FencingStatement,
  ProtoError,
  type SignedFencing,
  uuidToText,
  verifyFencing,
} from 'vtpm-proto';
import { ManagerError } from '../error.js';
import type { TrustStore } from '../trust/trust-configuration.js';

/** Milliseconds. A statement is about what is so now: whoever keeps one for later has not looked. */
export const MAX_STATEMENT_AGE_MS = 24 * 3_600_000;
/** Between the clock of who signed and this one. */
const CLOCK_SKEW_MS = 5 * 60_000;
const MAX_METHOD_LENGTH = 500;
/** Room above it is left: what goes on has a later one, in 64 bits. */
const MAX_GENERATION = 1n << 62n;

/**
 * The operator's word that a host is dead, believed where the toolstack key is trusted for that vTPM here and the word is
 * fresh. Nothing stands in for it.
 * @param now Unix milliseconds
 * @throws ManagerError `not-fenced` that says what is wrong with it
 */
export function checkFencing(
  signed: SignedFencing | undefined,
  trust: Pick<TrustStore, 'isToolstackKeyTrusted'>,
  now: number,
): FencingStatement {
  if (!signed) throw notFenced('there is no statement that the host is fenced');
  let statement: FencingStatement;
  try {
    statement = verifyFencing(signed);
  } catch (cause) {
    if (!(cause instanceof ProtoError)) throw cause;
    throw notFenced(`the statement is refused: ${cause.message}`, cause);
  }
  const { toolstackKey, vtpmUuid, lastGeneration, method } = statement;
  if (!trust.isToolstackKeyTrusted(toolstackKey, vtpmUuid)) {
    throw notFenced(
      `the statement about vTPM ${uuidToText(vtpmUuid)} comes from a toolstack key that this manager does not trust; make it here`,
    );
  }
  if (lastGeneration > MAX_GENERATION) {
    throw notFenced(
      `the statement knows of generation ${lastGeneration}, which no vTPM reaches; make a new one`,
    );
  }
  const age = now - Number(statement.at);
  if (age > MAX_STATEMENT_AGE_MS) {
    const hours = Math.floor(age / 3_600_000);
    throw notFenced(`the statement is ${hours} hours old; look again, and make a new one`);
  }
  if (age < -CLOCK_SKEW_MS) throw notFenced('the statement is of a time to come; compare the clocks');
  if (method.trim() === '' || method.length > MAX_METHOD_LENGTH) {
    throw notFenced(
      `the statement says in 1 to ${MAX_METHOD_LENGTH} characters how the host was fenced; this one does not`,
    );
  }
  return statement;
}

/**
 * @param state that is to go on, and what it is
 * @throws ManagerError `not-fenced` where the statement speaks of another vTPM or knows less than the state
 */
export function checkStatementFits(
  statement: FencingStatement,
  facts: { readonly vtpmUuid: Uint8Array; readonly generation: bigint },
  state: 'the backup' | 'the departure' = 'the backup',
): void {
  const { vtpmUuid, lastGeneration } = statement;
  if (!bytesEqual(vtpmUuid, facts.vtpmUuid)) {
    throw notFenced(
      `the statement is about vTPM ${uuidToText(vtpmUuid)}, ${state} is of vTPM ${uuidToText(facts.vtpmUuid)}`,
    );
  }
  if (lastGeneration < facts.generation) {
    throw notFenced(
      `the statement knows of generation ${lastGeneration}, ${state} has ${facts.generation} already: it was made for another time; make a new one`,
    );
  }
}

/** @param why what is wrong with the statement, or with what it says */
export function notFenced(why: string, cause?: unknown): ManagerError {
  return new ManagerError(
    'not-fenced',
    `${why} (vtpmctl migrate fence, when the host is off and stays so)`,
    cause === undefined ? {} : { cause },
  );
}
