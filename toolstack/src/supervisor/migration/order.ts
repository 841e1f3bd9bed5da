import {
  decode,
  type MigrateMode,
  ProtoError,
  type SignedMigrateOrder,
  uuidToText,
  verifyMigrateOrder,
} from 'vtpm-proto';
import { ToolstackError } from '../../error.js';

/** An order as its caller brings it. Whether it is good, the manager decides. */
export interface Order {
  readonly signed: SignedMigrateOrder;
  /** 32 hex digits. */
  readonly migration: string;
  readonly vtpm: string;
  /** Host id of the destination, hex. */
  readonly destination: string;
  readonly mode: MigrateMode;
  readonly isDryRun: boolean;
}

/** @param body of POST /vtpms/:vtpm/migrate @throws ToolstackError `bad-request` */
export function readOrder(body: unknown): Order {
  const { order: text } = (body ?? {}) as { order?: unknown };
  if (typeof text !== 'string') throw new ToolstackError('bad-request', '"order" is a signed order, base64');
  try {
    const signed = decode('SignedMigrateOrder', Buffer.from(text, 'base64'));
    const order = verifyMigrateOrder(signed);
    return {
      signed,
      migration: hex(order.migrationId),
      vtpm: uuidToText(order.vtpmUuid),
      destination: hex(order.destination),
      mode: order.mode,
      isDryRun: order.dryRun,
    };
  } catch (cause) {
    if (!(cause instanceof ProtoError)) throw cause;
    throw new ToolstackError('bad-request', `the order is refused: ${cause.message}`, { cause });
  }
}

function hex(bytes: Uint8Array): string {
  return Buffer.from(bytes).toString('hex');
}
