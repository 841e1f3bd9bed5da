import { ManagerError } from '../error.js';
import type { AuditEntry } from './entry.js';
import type { AuditHead } from './head.js';
import { Segments } from './segments.js';
import { type AuditKeys, type AuditReport, AuditWalk, type VerifiedLine } from './walk.js';

/**
 * Reads the whole log, or what was not moved away of it, in bounded memory. It may be appended to meanwhile.
 * @param path of the newest file
 * @param head that the anchor holds, or that of the open log
 * @param last nothing after this entry is looked at: for a log that is open
 * @throws ManagerError `newer-format`, and where the files cannot be read
 */
export async function verifyAudit(
  path: string,
  keys: AuditKeys,
  head: AuditHead,
  last?: bigint,
): Promise<AuditReport> {
  return withSegments(path, async (segments) => {
    const walk = new AuditWalk(segments, head, keys);
    for await (const _ of walk.lines(segments.all, last));
    return walk.report;
  });
}

/**
 * The newest `count` entries, oldest first.
 * @param head of the open log: the chain to it proves them
 * @throws ManagerError `audit-corrupt`, `newer-format`
 */
export async function tailOf(path: string, head: AuditHead, count: number): Promise<AuditEntry[]> {
  const newest: AuditEntry[] = [];
  for await (const lines of linesFrom(path, head, head.length - BigInt(count) + 1n)) {
    newest.push(...lines.map(({ entry }) => entry));
    newest.splice(0, newest.length - count);
  }
  return newest;
}

/**
 * All entries, some at a time, the oldest first; without those of files that were moved away.
 * @param head of the log: the chain to it proves them
 * @throws ManagerError `audit-corrupt`, `newer-format`
 */
export async function* allOf(path: string, head: AuditHead): AsyncGenerator<AuditEntry[]> {
  for await (const lines of linesFrom(path, head, 1n)) yield lines.map(({ entry }) => entry);
}

/**
 * Entries `from` to `to`, as they are in the file, each with its newline. Goes on to the head after them: what came out
 * is genuine when the end was reached without an error.
 * @throws ManagerError `audit-corrupt`, `newer-format`; `bad-request` where the file of the first was moved away
 */
export async function* exportOf(
  path: string,
  head: AuditHead,
  from: bigint,
  to: bigint,
): AsyncGenerator<string> {
  let isFirst = true;
  for await (const lines of linesFrom(path, head, from)) {
    const first = lines[0]?.entry.n ?? from;
    if (isFirst && first > from) {
      throw new ManagerError(
        'bad-request',
        `the entries before ${first} are in files that were moved away; export from ${first} on, or put them back`,
      );
    }
    isFirst = false;
    const wanted = lines.filter(({ entry }) => entry.n >= from && entry.n <= to);
    if (wanted.length > 0) yield wanted.map(({ bytes }) => `${bytes.toString('latin1')}\n`).join('');
  }
}

async function* linesFrom(path: string, head: AuditHead, n: bigint): AsyncGenerator<VerifiedLine[]> {
  const segments = await openSegments(path);
  try {
    const walk = new AuditWalk(segments, head);
    yield* walk.lines(await segments.from(n), head.length);
    refuseFlaw(walk.report);
  } catch (error) {
    throw unreadable(path, error);
  } finally {
    await segments.close();
  }
}

/** Runs `body` on the files as they are now. */
export async function withSegments<T>(path: string, body: (segments: Segments) => Promise<T>): Promise<T> {
  const segments = await openSegments(path);
  try {
    return await body(segments);
  } catch (error) {
    throw unreadable(path, error);
  } finally {
    await segments.close();
  }
}

/** @throws ManagerError `audit-corrupt` */
export function refuseFlaw({ flaw }: AuditReport): void {
  if (!flaw) return;
  throw new ManagerError(
    'audit-corrupt',
    `the audit log ${flaw.path} was changed or damaged: entry ${flaw.entry} ${flaw.what}. ` +
      'See what is left of it with: vtpmctl audit verify. Restore it from a backup, or accept the loss with: vtpmctl recover --accept-rollback',
  );
}

async function openSegments(path: string): Promise<Segments> {
  try {
    return await Segments.open(path);
  } catch (error) {
    throw unreadable(path, error);
  }
}

function unreadable(path: string, error: unknown): ManagerError {
  return ManagerError.from(error, `the audit log ${path} cannot be read`);
}
