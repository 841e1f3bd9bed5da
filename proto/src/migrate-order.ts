import { expectLength } from './bytes.js';
import { decode, encode } from './codec.js';
import { ProtoError } from './error.js';
import type {
  FencingStatement,
  MigrateOrder,
  SignedFencing,
  SignedMigrateOrder,
} from './generated/messages.js';
import type { SigningKey } from './identity.js';
import { checkFormat, checkSignature } from './signature.js';

/** Format number of migrate orders and fencing statements; a newer one is refused by name. */
export const MIGRATE_ORDER_FORMAT = 1;

const ORDER_DOMAIN = Buffer.from('vtpm.v1 migrate order\0');
const FENCING_DOMAIN = Buffer.from('vtpm.v1 fencing\0');

/** Has a manager move one vTPM to another host. */
export function signMigrateOrder(toolstackKey: SigningKey, order: MigrateOrder): SignedMigrateOrder {
  const bytes = encode('MigrateOrder', order);
  return { order: bytes, signature: toolstackKey.sign(Buffer.concat([ORDER_DOMAIN, bytes])) };
}

/**
 * The order, by the toolstack key that it names. Whether that key is trusted, and what only the manager knows (its id,
 * epoch, generation, boot, time), is the caller's to check.
 * @throws ProtoError `malformed`, `forged` or `newer-format`
 */
export function verifyMigrateOrder(signed: SignedMigrateOrder): MigrateOrder {
  const order = decode('MigrateOrder', signed.order);
  checkFormat('migrate order', order.format, MIGRATE_ORDER_FORMAT);
  for (const [what, bytes, length] of [
    ['manager id', order.managerId, 32],
    ['toolstack key', order.toolstackKey, 32],
    ['vTPM uuid', order.vtpmUuid, 16],
    ['VM uuid', order.vmUuid, 16],
    ['destination', order.destination, 32],
    ['migration id', order.migrationId, 16],
    ['boot id', order.bootId, 16],
    ['signature', signed.signature, 64],
  ] as const) {
    expectLength(what, bytes, length);
  }
  checkSignature('migrate order', order.toolstackKey, ORDER_DOMAIN, signed.order, signed.signature);
  return order;
}

/** Says that a host runs a vTPM no more and will not, as whoever holds the toolstack key has seen to. */
export function signFencing(toolstackKey: SigningKey, statement: FencingStatement): SignedFencing {
  const bytes = encode('FencingStatement', statement);
  return { statement: bytes, signature: toolstackKey.sign(Buffer.concat([FENCING_DOMAIN, bytes])) };
}

/**
 * The statement, by the toolstack key that it names; whether that key is trusted, and how old it is, is the caller's to
 * check.
 * @throws ProtoError `malformed`, `forged` or `newer-format`
 */
export function verifyFencing(signed: SignedFencing): FencingStatement {
  const statement = decode('FencingStatement', signed.statement);
  checkFormat('fencing statement', statement.format, MIGRATE_ORDER_FORMAT);
  for (const [what, bytes, length] of [
    ['toolstack key', statement.toolstackKey, 32],
    ['vTPM uuid', statement.vtpmUuid, 16],
    ['host id', statement.host, 32],
    ['signature', signed.signature, 64],
  ] as const) {
    expectLength(what, bytes, length);
  }
  checkSignature(
    'fencing statement',
    statement.toolstackKey,
    FENCING_DOMAIN,
    signed.statement,
    signed.signature,
  );
  return statement;
}

/** So that a file or a line of a message says what it is. */
const FENCING_PREFIX = 'vtpm-fencing-1-';

/** One line of text for a signed statement. */
export function fencingText(signed: SignedFencing): string {
  return FENCING_PREFIX + encode('SignedFencing', signed).toString('base64url');
}

/** @throws ProtoError `malformed` where it is not what `fencingText` makes */
export function parseFencingText(text: string): SignedFencing {
  const line = text.trim();
  const base64 = line.startsWith(FENCING_PREFIX) ? line.slice(FENCING_PREFIX.length) : '';
  const bytes = Buffer.from(base64, 'base64url');
  if (bytes.length > 0 && bytes.toString('base64url') === base64) return decode('SignedFencing', bytes);
  throw new ProtoError(
    'malformed',
    `a fencing statement is one line that begins with ${FENCING_PREFIX}, as vtpmctl migrate fence wrote it`,
  );
}
