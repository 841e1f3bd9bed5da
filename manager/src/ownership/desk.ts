import { type RecordHeader, uuidToText } from 'vtpm-proto';
import {
  type AuditAction,
  type AuditActor,
  type AuditEvent,
  type AuditHead,
  type AuditLog,
  type AuditVerdict,
  Refusals,
} from '../audit/index.js';
import type { Erasure } from '../erasure.js';
import { ManagerError } from '../error.js';
import type { KeyHierarchy } from '../keys/index.js';
import type { AnchoredStore } from '../store/anchored-store.js';
import type { Census } from './census.js';
import { type VtpmChange, VtpmEvents } from './events.js';
import { Slot } from './slot.js';
import { type HeldRecord, VtpmRecords } from './vtpm-records.js';

/** What a vTPM is called in the log and in events. */
export type NamedVtpm = Pick<RecordHeader, 'vtpmUuid' | 'epoch' | 'generation'>;

export interface DeskOptions {
  readonly keys: KeyHierarchy;
  readonly store: AnchoredStore;
  readonly audit: Pick<AuditLog, 'append'>;
  readonly erasure: Pick<Erasure, 'note'>;
  /** Has counted the store. */
  readonly census: Census;
  /** Called before a new vTPM is made. @throws ManagerError `store-full` where the room left is for the others */
  checkRoom?(): void;
}

/** What everybody who changes a vTPM's record works at: its place, the records, the log, the events. */
export class Desk {
  readonly events = new VtpmEvents();
  readonly records: VtpmRecords;
  readonly #slots = new Map<string, Slot>();
  readonly #refusals: Refusals;
  readonly #beside = new Set<Promise<unknown>>();
  #connected = 0;
  #isClosing = false;

  constructor(private readonly options: DeskOptions) {
    this.records = new VtpmRecords(options);
    this.#refusals = new Refusals(options.audit);
  }

  get keys(): KeyHierarchy {
    return this.options.keys;
  }

  get store(): AnchoredStore {
    return this.options.store;
  }

  get census(): Census {
    return this.options.census;
  }

  /** Workers whose Save stream is open. */
  get connected(): number {
    return this.#connected;
  }

  checkRoom(): void {
    this.options.checkRoom?.();
  }

  /** @throws ManagerError `shutting-down` */
  checkOpen(): void {
    if (this.#isClosing) throw new ManagerError('shutting-down', 'the manager is shutting down; try again');
  }

  slot(vtpmUuid: string): Slot {
    let slot = this.#slots.get(vtpmUuid);
    if (!slot) {
      slot = new Slot(vtpmUuid, (isConnected) => {
        this.#connected += isConnected ? 1 : -1;
      });
      this.#slots.set(vtpmUuid, slot);
    }
    return slot;
  }

  /** The place of a vTPM where there is one. */
  slotOf(vtpmUuid: string): Slot | undefined {
    return this.#slots.get(vtpmUuid);
  }

  /** Runs in the vTPM's place, which does not stay where nothing is remembered in it. */
  async visit<T>(vtpmUuid: string, operation: (slot: Slot) => Promise<T>): Promise<T> {
    const slot = this.slot(vtpmUuid);
    try {
      return await operation(slot);
    } finally {
      if (slot.isDispensable) this.#slots.delete(vtpmUuid);
    }
  }

  /** A slot stays: who proved nothing must not make one for each uuid that he thinks of. */
  async checkKnown(vtpmUuid: string, refusal: ManagerError): Promise<void> {
    if (!this.#slots.has(vtpmUuid) && !(await this.records.read(vtpmUuid))) throw refusal;
  }

  /** @throws ManagerError `unknown-vtpm` */
  async known(vtpmUuid: string): Promise<HeldRecord> {
    const held = await this.records.read(vtpmUuid);
    if (!held) throw unknownVtpm(vtpmUuid);
    return held;
  }

  /** Resolves when every operation that is under way now has ended; those that come later are not waited for. */
  async settled(): Promise<void> {
    await Promise.all([...this.#slots.values()].map((slot) => slot.idle()));
  }

  /** Before a vTPM's state is dropped: says from when on old disks hold what nobody is to open any more. */
  async noteErasure(now: number): Promise<void> {
    await this.options.erasure.note(this.keys.current.keyId, now);
  }

  async audit(
    actor: AuditActor,
    action: AuditAction,
    verdict: AuditVerdict,
    { vtpmUuid, epoch, generation }: NamedVtpm,
    facts?: Readonly<Record<string, string>>,
  ): Promise<AuditHead> {
    return await this.options.audit.append({
      actor,
      action,
      verdict,
      vtpm: uuidToText(vtpmUuid),
      epoch,
      generation,
      ...(facts && { facts }),
    });
  }

  /** What a worker may not have, although its ticket is signed. Never rejects. */
  noteRefusal(
    actor: AuditActor,
    action: AuditAction,
    { vtpmUuid, epoch, generation }: NamedVtpm,
    reason: ManagerError,
  ): Promise<void> {
    const vtpm = uuidToText(vtpmUuid);
    return this.note({ actor, action, verdict: 'refused', vtpm, epoch, generation, reason });
  }

  /** A refusal, at a bounded rate. Never rejects. */
  note(event: AuditEvent): Promise<void> {
    return this.#refusals.note(event);
  }

  emit(type: VtpmChange['type'], { vtpmUuid, epoch, generation }: NamedVtpm): void {
    this.events.emit({ type, id: uuidToText(vtpmUuid), epoch, generation });
  }

  /**
   * That something is done, of which the intention is in the log already and the record says that it is so. Nobody waits for
   * it: a log that is full changes nothing of what is done.
   */
  noteDone(
    actor: AuditActor,
    action: AuditAction,
    vtpm: NamedVtpm,
    facts: Readonly<Record<string, string>>,
  ): void {
    const noted: Promise<unknown> = this.audit(actor, action, 'done', vtpm, facts)
      .catch(() => undefined)
      .finally(() => this.#beside.delete(noted));
    this.#beside.add(noted);
  }

  /** Ends every stream; resolves when no operation is under way. */
  async close(error: ManagerError): Promise<void> {
    this.#isClosing = true;
    for (const slot of this.#slots.values()) {
      await slot.idle();
      slot.live?.end(error);
    }
    this.events.end();
    await Promise.all(this.#beside);
    await this.#refusals.close();
  }
}

/** What the toolstack has in its list, and never ran, is not known either. */
export function unknownVtpm(vtpmUuid: string): ManagerError {
  return new ManagerError(
    'unknown-vtpm',
    `there is no state of a vTPM ${vtpmUuid} here; where vtpmctl list shows it, it never ran: start it once, or create it on ` +
      'the host where it is to run',
  );
}
