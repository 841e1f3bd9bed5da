import { createHmac, timingSafeEqual } from 'node:crypto';
import { type AnchorStatement, bytesEqual, decode, encode } from 'vtpm-proto';
import { ManagerError } from '../error.js';

/** The record that states what the newest store is. */
export const ANCHOR_KEY = 'anchor';
const FORMAT = 1;

/** The anchor for a root of 32 bytes. */
export function sealAnchor(anchorKey: Uint8Array, storeId: Uint8Array, root: Uint8Array): Buffer {
  const statement = encode('AnchorStatement', {
    format: FORMAT,
    storeId,
    root,
    // The chip has no counter for it yet.
    counter: 0n,
    auditHead: new Uint8Array(0),
  });
  return encode('AnchorRecord', { statement, mac: macOf(anchorKey, statement) });
}

/**
 * @returns the statement of an anchor that was written under this key for this store
 * @throws ManagerError `store-corrupt` or `newer-format`
 */
export function openAnchor(anchorKey: Uint8Array, storeId: Uint8Array, record: Uint8Array): AnchorStatement {
  const { statement, mac } = parse('AnchorRecord', record);
  const expected = macOf(anchorKey, statement);
  if (mac.length !== expected.length || !timingSafeEqual(mac, expected)) {
    throw corrupt("its anchor was not written by this installation's TPM key, or was changed");
  }
  const parsed = parse('AnchorStatement', statement);
  if (parsed.format > FORMAT) {
    throw new ManagerError(
      'newer-format',
      `the store's anchor has format ${parsed.format}, this version reads ${FORMAT}; use the version that wrote it`,
    );
  }
  if (parsed.format !== FORMAT) throw corrupt(`its anchor has format ${parsed.format}, which there is not`);
  if (!bytesEqual(parsed.storeId, storeId)) throw corrupt('its anchor belongs to another store');
  return parsed;
}

function parse<K extends 'AnchorRecord' | 'AnchorStatement'>(
  name: K,
  bytes: Uint8Array,
): ReturnType<typeof decode<K>> {
  try {
    return decode(name, bytes);
  } catch (cause) {
    throw corrupt('its anchor cannot be read', cause);
  }
}

function macOf(anchorKey: Uint8Array, statement: Uint8Array): Buffer {
  return createHmac('sha256', anchorKey).update(statement).digest();
}

function corrupt(what: string, cause?: unknown): ManagerError {
  return new ManagerError('store-corrupt', `the store is damaged: ${what}; restore it from a backup`, {
    cause,
  });
}
