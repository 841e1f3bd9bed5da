import { ManagerError } from '../error.js';
import { secretBuffer, wipe } from '../keys/index.js';
import { CurrentFile } from './current-file.js';
import { type AuditEntry, type AuditEvent, eventMembers } from './entry.js';
import { type AuditHead, EMPTY_HEAD, lineDigest } from './head.js';
import { type AuditKey, sealLine } from './line.js';
import { exportOf, refuseFlaw, tailOf, verifyAudit, withSegments } from './verify.js';
import { type AuditKeys, type AuditReport, AuditWalk } from './walk.js';

/**
 * What was done with this installation, by whom: appended to only. Each entry holds the digest of the one before and
 * is authenticated; the anchor of the store holds the last one's number and digest.
 *
 * An entry counts as kept once the anchor of a later commit has it. Who controls the disk can take away those after it.
 */
export interface AuditLog {
  /** Of the last durable entry. */
  readonly head: AuditHead;
  /**
   * Durable when it resolves; entries that come while others are written share the next write. Entries are in the order
   * of the calls.
   * @returns the head with this entry as the last
   * @throws ManagerError `store-full` (nothing was written; later entries may work), `bad-request`, `shutting-down`;
   * anything else ends the log: it refuses whatever follows with the same error
   */
  append(event: AuditEvent): Promise<AuditHead>;
  /**
   * Entries appended from now on are under this key. Resolves when those before are durable. Until an anchor holds the
   * `head` of then, both keys open the log.
   */
  withKey(key: AuditKey): Promise<void>;
  /** Verifies everything up to `head`, also files that a start does not look at. */
  verify(): Promise<AuditReport>;
  /** The newest `count` entries, oldest first. @throws ManagerError `audit-corrupt` */
  tail(count: number): Promise<AuditEntry[]>;
  /**
   * Entries `from` to `to` as JSON lines, as they are in the file. What came out is genuine when the end was reached.
   * @throws ManagerError `audit-corrupt`; `bad-request` where the first one's file was moved away
   */
  exportEntries(from: bigint, to: bigint): AsyncGenerator<string>;
  /** Writes what was asked for, then wipes the key. */
  close(): Promise<void>;
}

export interface AuditLogOptions {
  /** A file that has reached it is closed, and another one begun. A start reads about this much. */
  readonly segmentBytes?: number;
  /** Called after each write of entries. */
  onWritten?(): void;
}

export interface OpenedAuditLog {
  readonly log: AuditLog;
  /** Entries that are newer than the anchor: the manager ended between them and the commit they announced. */
  readonly unanchored: bigint;
  /** Whether the beginning of an entry that was never acknowledged was cut off. */
  readonly wasTorn: boolean;
}

/**
 * Begins an audit log, in init only.
 * @param path of the newest file; older ones are beside it
 * @throws ManagerError `already-initialised`, `store-full`, `home-unwritable`
 */
export async function createAuditLog(
  path: string,
  key: AuditKey,
  options: AuditLogOptions = {},
): Promise<AuditLog> {
  return new GroupAuditLog(path, await CurrentFile.create(path), EMPTY_HEAD, key, options);
}

/**
 * Opens an audit log and verifies it from the anchored entry's file on. Files before that are for `verify`; the operator
 * may move them away, except the newest one of them.
 * @param anchored as the verified anchor has it
 * @throws ManagerError `audit-corrupt` naming the first entry that is not as it was, `newer-format`, `home-unwritable`
 */
export async function openAuditLog(
  path: string,
  keys: AuditKeys,
  anchored: AuditHead,
  options: AuditLogOptions = {},
): Promise<OpenedAuditLog> {
  return withSegments(path, async (segments) => {
    const walk = new AuditWalk(segments, anchored, keys);
    const files = await segments.from(anchored.length + 1n);
    for await (const _ of walk.lines(files));
    refuseFlaw(walk.report);
    const { head, unanchored, torn } = walk.report;
    const number = walk.segment ?? 1;
    const file = files.at(-1)?.isCurrent
      ? await CurrentFile.open(path, number, torn?.offset)
      : CurrentFile.closed(path, number + 1);
    const log = new GroupAuditLog(path, file, head, keys.current, options);
    return { log, unanchored, wasTorn: torn !== undefined };
  });
}

const SEGMENT_BYTES = 8 * 1024 * 1024;
const MAX_BATCH_BYTES = 1024 * 1024;

interface QueuedEntry {
  /** JSON members. */
  readonly event: string;
  readonly key: AuditKey;
  resolve(head: AuditHead): void;
  reject(error: ManagerError): void;
}

class GroupAuditLog implements AuditLog {
  #head: AuditHead;
  #key: AuditKey;
  #queue: QueuedEntry[] = [];
  /** Writes until the queue is empty; never rejects. */
  #writing: Promise<void> | undefined;
  /** Once what was asked for until now is written or has failed. */
  #settled: Promise<unknown> = Promise.resolve();
  /** Why the log refuses everything. */
  #broken: ManagerError | undefined;
  #closing: Promise<void> | undefined;

  constructor(
    private readonly path: string,
    private readonly file: CurrentFile,
    head: AuditHead,
    key: AuditKey,
    private readonly options: AuditLogOptions,
  ) {
    this.#head = head;
    this.#key = copyOf(key);
  }

  get head(): AuditHead {
    return this.#head;
  }

  append(event: AuditEvent): Promise<AuditHead> {
    const written = new Promise<AuditHead>((resolve, reject) => {
      this.#refuseIfEnded();
      this.#queue.push({ event: eventMembers(event, new Date()), key: this.#key, resolve, reject });
      this.#writing ??= this.#write();
    });
    this.#settled = Promise.allSettled([this.#settled, written]).then(() => undefined);
    return written;
  }

  async withKey(key: AuditKey): Promise<void> {
    this.#refuseIfEnded();
    const old = this.#key;
    this.#key = copyOf(key);
    await this.#settled;
    wipe(old.key);
  }

  async verify(): Promise<AuditReport> {
    this.#refuseIfEnded();
    const { head } = this;
    // A copy: the key may be replaced and wiped meanwhile.
    const current = copyOf(this.#key);
    try {
      return await verifyAudit(this.path, { current }, head, head.length);
    } finally {
      wipe(current.key);
    }
  }

  tail(count: number): Promise<AuditEntry[]> {
    return tailOf(this.path, this.head, count);
  }

  exportEntries(from: bigint, to: bigint): AsyncGenerator<string> {
    return exportOf(this.path, this.head, from, to);
  }

  close(): Promise<void> {
    this.#closing ??= this.#end();
    return this.#closing;
  }

  async #end(): Promise<void> {
    await this.#writing;
    await this.file.close();
    wipe(this.#key.key);
  }

  async #write(): Promise<void> {
    // Entries of the same turn of the event loop share the first write too.
    await Promise.resolve();
    while (this.#queue.length > 0) await this.#writeBatch();
    this.#writing = undefined;
  }

  async #writeBatch(): Promise<void> {
    let batch: QueuedEntry[] = [];
    try {
      if (this.file.size >= (this.options.segmentBytes ?? SEGMENT_BYTES)) await this.file.rotate();
      const { lines, heads } = this.#sealBatch();
      batch = this.#queue.splice(0, heads.length);
      await this.file.append(Buffer.concat(lines));
      this.#head = heads.at(-1) ?? this.#head;
      this.options.onWritten?.();
      for (const [i, { resolve }] of batch.entries()) resolve(heads[i] ?? this.#head);
    } catch (cause) {
      const error = ManagerError.from(cause, 'the audit log cannot be written');
      if (error.code !== 'store-full') this.#broken = error;
      // Those who wait get their own try, but not of a log that is broken or cannot go on to its next file.
      const isLast = this.#broken !== undefined || batch.length === 0;
      for (const { reject } of isLast ? [...batch, ...this.#queue.splice(0)] : batch) reject(error);
    }
  }

  #sealBatch(): { lines: Buffer[]; heads: AuditHead[] } {
    const lines: Buffer[] = [];
    const heads: AuditHead[] = [];
    let head = this.#head;
    let bytes = 0;
    for (const { event, key } of this.#queue) {
      if (bytes >= MAX_BATCH_BYTES) break;
      const isFirst = this.file.size + bytes === 0;
      const line = sealLine(event, head, key, isFirst ? this.file.number : undefined);
      head = { length: head.length + 1n, digest: lineDigest(line) };
      heads.push(head);
      lines.push(line, NEWLINE);
      bytes += line.length + NEWLINE.length;
    }
    return { lines, heads };
  }

  #refuseIfEnded(): void {
    if (this.#broken) throw this.#broken;
    if (this.#closing) throw new ManagerError('shutting-down', 'the audit log is being closed');
  }
}

const NEWLINE = Buffer.from('\n');

/** Not from the shared pool: it is wiped. */
function copyOf({ id, key }: AuditKey): AuditKey {
  const copy = secretBuffer(key.length);
  copy.set(key);
  return { id, key: copy };
}
