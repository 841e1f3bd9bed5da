import { type AuditHead, EMPTY_HEAD, lineDigest } from './head.js';
import { readLine } from './line.js';
import type { Segments } from './segments.js';
import { withSegments } from './verify.js';
import { type AuditReport, AuditWalk } from './walk.js';

/**
 * Verifies files of which neither keys nor anchor are at hand: that each entry follows the one before. Who has the disk
 * can cut entries off the end, or write the whole log anew; that only the keys tell.
 * @param path of the newest file
 * @throws ManagerError where the files cannot be read
 */
export function verifyChain(path: string): Promise<AuditReport> {
  return withSegments(path, async (segments) => {
    const walk = new AuditWalk(segments, await lastOf(segments));
    for await (const _ of walk.lines(segments.all));
    return walk.report;
  });
}

const NO_KEYS = new Map<number, Uint8Array>();

/** The last entry that is one by its form. */
async function lastOf(segments: Segments): Promise<AuditHead> {
  for (const segment of [...segments.all].reverse()) {
    let last: AuditHead | undefined;
    for await (const lines of segments.lines(segment)) {
      for (const { bytes, end } of lines) {
        const read = end === 'newline' ? readLine(bytes, NO_KEYS) : undefined;
        if (read) last = { length: read.entry.n, digest: lineDigest(bytes) };
      }
    }
    if (last) return last;
  }
  return EMPTY_HEAD;
}
