import { hash } from 'node:crypto';
import { setTimeout as delay } from 'node:timers/promises';
import { barrier } from 'vtpm-common';
import {
  bytesEqual,
  decode,
  encode,
  type ManagerFrameType,
  ProtoError,
  type RecordHeader,
  type SaveBody,
  type SessionCipher,
  type WorkerFrame,
} from 'vtpm-proto';
import type { AuditAction } from '../audit/index.js';
import { ManagerError } from '../error.js';
import { type KeyHierarchy, wipe } from '../keys/index.js';
import { metrics } from '../metrics.js';
import { applySave, PART_LIMITS, rekey, type VtpmRecord, withoutSession } from '../records/index.js';
import type { SaveLink } from './registry.js';
import type { Slot } from './slot.js';
import { actionOf, auditedUse, checkUse, isCounted } from './state-use.js';
import type { HeldRecord, VtpmRecords } from './vtpm-records.js';
import type { WorkGate } from './work-gate.js';

const EMPTY = new Uint8Array(0);
const MAX_VERSION_LENGTH = 64;

export interface SessionParts {
  readonly slot: Slot;
  readonly work: WorkGate;
  readonly keys: KeyHierarchy;
  readonly records: VtpmRecords;
  readonly cipher: SessionCipher;
  readonly link: SaveLink;
  readonly linkNumber: bigint;
  readonly held: HeldRecord;
  /** Durable when it resolves. @param facts digests of what is gone out or came in */
  audit(action: AuditAction, header: RecordHeader, facts: Readonly<Record<string, string>>): Promise<void>;
  /** It asked for what its ticket does not have. Never rejects. */
  refused(action: AuditAction, header: RecordHeader, reason: ManagerError): Promise<void>;
  onSaved(record: VtpmRecord): void;
  onFenced(record: VtpmRecord): void;
}

/**
 * A worker's session while its Save stream is connected. The record in memory is this session's: nobody else writes
 * it, and the store refuses a write that is not on top of the version it came from.
 */
export class LiveSession {
  #held: HeldRecord;
  #isOver = false;
  /** Only the worker itself can have sent what was new. */
  #isProven = false;
  #pauseMs = 0;
  #controlFrames = 0n;
  /** Who waits for the worker to stop, and the FREEZE that it has to answer. */
  #freezing:
    | { readonly sequence: bigint; resolve(record: VtpmRecord): void; reject(error: ManagerError): void }
    | undefined;

  constructor(private readonly parts: SessionParts) {
    this.#held = parts.held;
  }

  get record(): VtpmRecord {
    return this.#held.record;
  }

  /** It commits nothing any more: the record in the store is the truth. */
  get isOver(): boolean {
    return this.#isOver;
  }

  /** Answers HELLO and RESUME: what is committed of this session. */
  greet(): Promise<void> {
    return this.#send('ACK', this.parts.linkNumber, this.#ack());
  }

  /**
   * One frame after the first. Resolves when it is answered.
   * @throws ManagerError that ends the stream: `bad-request`, `too-large`, `fenced`, or the store's
   */
  async receive(frame: WorkerFrame): Promise<void> {
    if (frame.type === 'SAVE') {
      const ack = await this.#commitFrame(frame);
      // Outside the order and the gate: a worker that does not read holds up nobody but itself.
      await this.#send('ACK', frame.sequence, ack);
      await this.#pause();
      return;
    }
    openFrame(this.parts.cipher, frame);
    if (frame.type !== 'FROZEN') {
      throw new ManagerError('bad-request', `${frame.type} is only the first frame of a stream`);
    }
    // That of an earlier FREEZE says nothing: the worker may have gone on since.
    if (frame.sequence === this.#freezing?.sequence) this.#freezing.resolve(this.record);
  }

  /**
   * Asks the worker to stop between two commands, with all of its TPM saved.
   * @returns the record that it left: its last save is acknowledged then
   * @throws ManagerError `migration-aborted` where it does not answer in time, or its link is gone
   */
  async suspend(limitMs: number): Promise<VtpmRecord> {
    const sequence = this.#nextControl();
    const timer = new AbortController();
    try {
      return await new Promise<VtpmRecord>((resolve, reject) => {
        this.#freezing?.reject(notFrozen('it was asked again'));
        this.#freezing = { sequence, resolve, reject };
        const late = notFrozen(`it did not answer within ${limitMs} ms`);
        delay(limitMs, undefined, timer).then(
          () => reject(late),
          () => undefined,
        );
        this.#send('FREEZE', sequence, encode('Freeze', { suspend: true })).catch(reject);
      });
    } finally {
      timer.abort();
      if (this.#freezing?.sequence === sequence) this.#freezing = undefined;
    }
  }

  thaw(): Promise<void> {
    return this.#control('THAW', EMPTY);
  }

  /** The stream has ended: nobody answers on it any more. */
  detached(): void {
    this.#freezing?.reject(notFrozen('its link was lost'));
  }

  /**
   * Changes the record between two saves, and nothing that is a save's. Called in the slot's order. Where that fails the
   * worker is to resume: its next save would be taken for one of a session that is over.
   */
  async rewrite(change: (record: VtpmRecord) => VtpmRecord): Promise<void> {
    try {
      await this.#commit(change(this.record));
    } catch (error) {
      this.end(ManagerError.from(error));
      throw error;
    }
  }

  /** Puts the record under the current generation of the root key. */
  async rekey(): Promise<void> {
    const { keys } = this.parts;
    if (this.record.header.keyId !== keys.current.keyId) await this.rewrite((record) => rekey(keys, record));
  }

  /** Tells the worker that the session is over, and ends the stream. Does not wait for the worker. */
  fence(message: string): void {
    if (this.#isOver) return;
    this.#isOver = true;
    this.parts.onFenced(this.record);
    // Where the worker is gone the end of the stream says the same.
    this.#control('FENCED', encode('Fenced', { reason: 'fenced', message })).catch(() => undefined);
    this.parts.link.end(new ManagerError('fenced', message));
    this.detached();
  }

  /** The stream is ending for another reason than the session's; a new link may resume it. */
  end(error: ManagerError): void {
    this.#isOver = true;
    this.parts.link.end(error);
    this.detached();
  }

  async #commitFrame(frame: WorkerFrame): Promise<Buffer> {
    const leave = await this.parts.work.enter(frame.sealed.length);
    let payload: Buffer | undefined;
    try {
      const opened = openFrame(this.parts.cipher, frame);
      payload = opened;
      return await this.parts.slot.inOrder(() => this.#save(frame.sequence, opened));
    } finally {
      wipe(payload);
      leave();
    }
  }

  /** @returns the acknowledgement to send */
  async #save(sequence: bigint, payload: Uint8Array): Promise<Buffer> {
    if (this.#isOver) throw new ManagerError('fenced', 'the session is over');
    const digest = hash('sha256', payload, 'buffer');
    const { session } = this.record.header;
    const last = session?.lastSequence ?? 0n;
    if (session && sequence === last && bytesEqual(session.lastDigest, digest)) {
      // The acknowledgement was lost with the link.
      metrics.saveAnswered('repeated');
      return this.#ack();
    }
    if (sequence < last && !this.#isProven) {
      // After a restart of the manager the first frame may be a recorded one: such a link ends, and not the session.
      throw new ManagerError(
        'wrong-worker',
        `save ${sequence} is older than save ${last}, on a link that brought nothing new: a replay; resume the session`,
      );
    }
    if (sequence <= last) {
      const message = `save ${sequence} is older than save ${last} or has other content: two workers, or a replay`;
      // Durable before it is said, so that no later link revives the session.
      await this.#commit(withoutSession(this.record));
      this.fence(message);
      throw new ManagerError('fenced', message);
    }
    if (sequence !== last + 1n) {
      throw new ManagerError('bad-request', `save ${sequence} came after save ${last}; resume the session`);
    }
    const body = readBody(payload);
    checkBody(body, this.record);
    await this.#checkUse(body);
    const next = applySave(this.parts.keys, this.record, { body, sequence, digest, now: BigInt(Date.now()) });
    const noted = this.#noteUse(body.use, next);
    // What goes out or comes in in the clear is in the log first; the rest is written beside it, and answered after both.
    if (isCounted(body.use)) await noted;
    noted.catch(() => undefined);
    // First what changes the record: nothing else of the vTPM begins while that is under way.
    await this.#commit(next, isCounted(body.use));
    await noted;
    this.#isProven = true;
    metrics.saveCommitted(payload.length);
    this.parts.onSaved(this.record);
    return this.#ack();
  }

  async #noteUse(use: SaveBody['use'], next: VtpmRecord): Promise<void> {
    const audited = auditedUse(use, this.record);
    if (!audited) return;
    this.#pauseMs = this.parts.slot.uses.spend(1);
    await this.parts.audit(audited.action, next.header, audited.facts);
    barrier('state-use.audited');
  }

  /** What the ticket may not have is written down, as at a Load. @throws ManagerError */
  async #checkUse(body: SaveBody): Promise<void> {
    try {
      checkUse(body, this.record);
    } catch (error) {
      const reason = ManagerError.from(error);
      if (body.use && reason.code === 'verb-missing') {
        await this.parts.refused(actionOf(body.use), this.record.header, reason);
      }
      throw error;
    }
  }

  /** Nothing more is read from a worker that said too often what its VMM does. */
  async #pause(): Promise<void> {
    const pauseMs = this.#pauseMs;
    this.#pauseMs = 0;
    if (pauseMs > 0) await delay(pauseMs, undefined, { ref: false });
  }

  /** @param isCounted it is counted before it resolves */
  async #commit(record: VtpmRecord, isCounted = false): Promise<void> {
    const { records, slot } = this.parts;
    try {
      barrier('manager-before-commit');
      // The first one is counted at once: on a disk from before it the vTPM would be manufactured again.
      const counting = isCounted || record.header.generation === 1n ? 'now' : 'later';
      const held = await records.write(slot.vtpmUuid, this.#held, record, counting);
      barrier('manager-after-commit');
      this.#held = held;
    } catch (error) {
      // Whether it was written is not known: only a new link, which reads the record again, may go on.
      this.#isOver = true;
      throw error;
    }
  }

  #ack(): Buffer {
    const { generation, session } = this.record.header;
    return encode('Ack', {
      generation,
      digest: session?.lastDigest ?? EMPTY,
      committed: session?.lastSequence ?? 0n,
    });
  }

  #control(type: Exclude<ManagerFrameType, 'ACK'>, payload: Uint8Array): Promise<void> {
    return this.#send(type, this.#nextControl(), payload);
  }

  /** Numbered link by link: links have rising numbers, so no number comes twice in a session. */
  #nextControl(): bigint {
    this.#controlFrames += 1n;
    return ((this.parts.linkNumber & 0xffffffffn) << 32n) | this.#controlFrames;
  }

  async #send(type: ManagerFrameType, sequence: bigint, payload: Uint8Array): Promise<void> {
    await this.parts.link.send(this.parts.cipher.sealManager(type, sequence, payload));
  }
}

function notFrozen(why: string): ManagerError {
  return new ManagerError('migration-aborted', `the worker did not stop: ${why}; it goes on here`);
}

/** @throws ManagerError `bad-request`: the frame is not of this session */
export function openFrame(cipher: SessionCipher, frame: WorkerFrame): Buffer {
  try {
    return cipher.openWorker(frame);
  } catch (error) {
    if (!(error instanceof ProtoError)) throw error;
    throw new ManagerError('bad-request', `the frame is refused: ${error.message}`, { cause: error });
  }
}

function readBody(payload: Uint8Array): SaveBody {
  try {
    return decode('SaveBody', payload);
  } catch (error) {
    if (!(error instanceof ProtoError)) throw error;
    throw new ManagerError('bad-request', `the save is not readable: ${error.message}`, { cause: error });
  }
}

function checkBody(body: SaveBody, record: VtpmRecord): void {
  const sizes = {
    permanent: body.permanent?.length,
    volatile: body.volatile?.length,
    journal: body.journal && body.journal.request.length + body.journal.response.length,
  };
  for (const part of ['permanent', 'volatile', 'journal'] as const) {
    const size = sizes[part];
    if (size === undefined) continue;
    if (size > PART_LIMITS[part]) {
      throw new ManagerError(
        'too-large',
        `a ${part} part has ${size} bytes, at most ${PART_LIMITS[part]} are taken`,
      );
    }
    if (size === 0) throw new ManagerError('bad-request', `the ${part} part of the save is empty`);
  }
  if (!body.permanent && record.header.generation === 0n) {
    throw new ManagerError('bad-request', 'the first save has no permanent part');
  }
  if (body.libtpmsVersion.length > MAX_VERSION_LENGTH) {
    throw new ManagerError('bad-request', 'the libtpms version of the save is too long');
  }
}
