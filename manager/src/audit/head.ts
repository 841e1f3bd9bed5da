import { hash } from 'node:crypto';
import { ManagerError } from '../error.js';

/** What the anchor of the store holds of the audit log. */
export interface AuditHead {
  /** Count of entries, the number of the last one. */
  readonly length: bigint;
  /** 32 bytes: SHA-256 of the last entry's line without its newline; zeros where there is none. */
  readonly digest: Buffer;
}

/** Of a log without entries; also the `prev` of entry 1. */
export const EMPTY_HEAD: AuditHead = { length: 0n, digest: Buffer.alloc(32) };

const HEAD_BYTES = 40;

/** 40 bytes for AnchorStatement.auditHead: length (u64, big-endian), digest. */
export function encodeAuditHead({ length, digest }: AuditHead): Buffer {
  const bytes = Buffer.alloc(HEAD_BYTES);
  bytes.writeBigUInt64BE(length);
  bytes.set(digest, 8);
  return bytes;
}

/** @throws ManagerError `store-corrupt` */
export function decodeAuditHead(bytes: Uint8Array): AuditHead {
  if (bytes.length !== HEAD_BYTES) {
    throw new ManagerError(
      'store-corrupt',
      "the store is damaged: its anchor holds no audit log's head; restore it from a backup",
    );
  }
  const copy = Buffer.from(bytes);
  return { length: copy.readBigUInt64BE(), digest: copy.subarray(8) };
}

/** @param line without its newline @returns 32 bytes */
export function lineDigest(line: Uint8Array): Buffer {
  return hash('sha256', line, 'buffer');
}
