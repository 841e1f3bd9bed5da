import { createHmac, timingSafeEqual } from 'node:crypto';
import { ManagerError } from '../error.js';
import { type AuditEntry, entryOf, members } from './entry.js';
import type { AuditHead } from './head.js';

/** Authenticates entries. Comes from the root key and changes with it. */
export interface AuditKey {
  /** Written into each entry; never used for two keys of an installation. */
  readonly id: number;
  /** 32 bytes. */
  readonly key: Uint8Array;
}

/** Longer than any line that is ever written. */
export const MAX_LINE_BYTES = 64 * 1024;

const FORMAT = 1;
/** `,"mac":"…"}` ends each line. */
const MAC = /,"mac":"([0-9a-f]{64})"\}$/;
const MAC_CHARACTERS = ',"mac":""}'.length + 64;

/**
 * One line without its newline:
 *
 *     {"format":1,"n":…,"segment":…,<event>,"prev":"…","keyId":…,"mac":"…"}
 *
 * `prev` is the digest of the line before. The MAC is HMAC-SHA256 over "vtpm.v1 audit", NUL and the line up to
 * `,"mac"`. `segment` is in the first line of a file only, so that a file that lost its beginning is known.
 */
export function sealLine(event: string, before: AuditHead, key: AuditKey, segment?: number): Buffer {
  const place = members({ format: FORMAT, n: Number(before.length + 1n), segment });
  const link = members({ prev: before.digest.toString('hex'), keyId: key.id });
  const body = Buffer.from(`{${place},${event},${link}`, 'latin1');
  return Buffer.concat([body, Buffer.from(`,"mac":"${macOf(body, key.key).toString('hex')}"}`)]);
}

/** What a line says. Where it stands in the chain is not verified yet. */
export interface ReadLine {
  readonly entry: AuditEntry;
  /** 32 bytes. */
  readonly prev: Buffer;
  readonly segment: number | undefined;
  /** Whether its MAC is right; undefined where its key is not known. */
  readonly isAuthentic: boolean | undefined;
}

/**
 * @param keys of 32 bytes by their ids
 * @returns undefined where this is no line of an audit log
 * @throws ManagerError `newer-format` where a line with a right MAC says so
 */
export function readLine(line: Buffer, keys: ReadonlyMap<number, Uint8Array>): ReadLine | undefined {
  const text = line.toString('latin1');
  const mac = MAC.exec(text)?.[1];
  if (mac === undefined || /[^ -~]/.test(text)) return undefined;
  const object = parseObject(text);
  if (!object) return undefined;
  const { format, n, segment, prev, keyId } = object;
  if (!isCount(format) || !isCount(keyId)) return undefined;
  const key = keys.get(keyId);
  const body = line.subarray(0, line.length - MAC_CHARACTERS);
  const isAuthentic = key && timingSafeEqual(macOf(body, key), Buffer.from(mac, 'hex'));
  if (isAuthentic && format > FORMAT) {
    throw new ManagerError(
      'newer-format',
      `the audit log has entries of format ${format}, this version reads ${FORMAT}; use the version that wrote it`,
    );
  }
  const isWhole =
    format === FORMAT &&
    isCount(n) &&
    (segment === undefined || isCount(segment)) &&
    typeof prev === 'string' &&
    /^[0-9a-f]{64}$/.test(prev);
  const entry = isWhole ? entryOf(BigInt(n), object) : undefined;
  if (!isWhole || !entry) return undefined;
  return { entry, prev: Buffer.from(prev, 'hex'), segment, isAuthentic };
}

function parseObject(text: string): Record<string, unknown> | undefined {
  try {
    // It ends with a brace: what parses is no bare value.
    return JSON.parse(text) as Record<string, unknown>;
  } catch {
    return undefined;
  }
}

function macOf(body: Uint8Array, key: Uint8Array): Buffer {
  return createHmac('sha256', key).update('vtpm.v1 audit\0').update(body).digest();
}

function isCount(value: unknown): value is number {
  return Number.isSafeInteger(value) && (value as number) >= 1;
}
