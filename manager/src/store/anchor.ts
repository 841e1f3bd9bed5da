import { createHmac, timingSafeEqual } from 'node:crypto';
import { bytesEqual, decode, encode } from 'vtpm-proto';
import type { AuditHead } from '../audit/index.js';
import { ManagerError } from '../error.js';
import type { KeyHierarchy, RootKeys } from '../keys/index.js';

/** The record that states what the newest store is. */
export const ANCHOR_KEY = 'anchor';
const FORMAT = 1;

export interface AnchorFacts {
  /** Root of the Merkle tree, 32 bytes. */
  readonly root: Uint8Array;
  /** What the chip's counter shows, or will show next. */
  readonly counter: bigint;
  readonly audit: AuditHead;
  /** Of the TPM, where its counter is orderly; 0 where it is not. */
  readonly resets: number;
  /** The TPM lost power with an orderly counter, and this anchor was written at the start after it. */
  readonly isUnclean: boolean;
}

export function sealAnchor({ anchorKey, storeId, keyId }: RootKeys, facts: AnchorFacts): Buffer {
  const statement = encode('AnchorStatement', {
    format: FORMAT,
    storeId,
    root: facts.root,
    counter: facts.counter,
    auditHead: facts.audit.digest,
    auditLength: facts.audit.length,
    resets: facts.resets,
    isUnclean: facts.isUnclean,
  });
  return encode('AnchorRecord', { statement, mac: macOf(anchorKey, statement), keyId });
}

/**
 * @returns the statement of an anchor that was written under this key for this store
 * @throws ManagerError `store-corrupt` or `newer-format`
 */
export function openAnchor(keys: KeyHierarchy, record: Uint8Array): AnchorFacts {
  const { statement, mac, keyId } = parse('AnchorRecord', record);
  const { anchorKey, storeId } = keys.ofGeneration(keyId, 'its anchor');
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
  const { root, counter, auditHead, auditLength, resets, isUnclean } = parsed;
  return { root, counter, audit: { length: auditLength, digest: Buffer.from(auditHead) }, resets, isUnclean };
}

/** What an anchor says, for who has no key: whether it is authentic only the manager knows. @throws ManagerError `store-corrupt` */
export function statedUnverified(
  record: Uint8Array,
): Pick<AnchorFacts, 'root' | 'counter'> & { keyId: number } {
  const { statement, keyId } = parse('AnchorRecord', record);
  const { root, counter } = parse('AnchorStatement', statement);
  return { root, counter, keyId };
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
