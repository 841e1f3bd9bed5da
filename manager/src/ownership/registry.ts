import { randomBytes } from 'node:crypto';
import { barrier, bootId, monotonicMs } from 'vtpm-common';
import {
  bytesEqual,
  type LoadRequest,
  type LoadResponse,
  type ManagerFrame,
  type RecordHeader,
  type Session,
  sessionCipher,
  uuidToText,
  type WorkerFrame,
} from 'vtpm-proto';
import {
  type AuditAction,
  type AuditActor,
  type AuditLog,
  type AuditVerdict,
  Refusals,
} from '../audit/index.js';
import type { Erasure } from '../erasure.js';
import { ManagerError } from '../error.js';
import { type KeyHierarchy, wipe } from '../keys/index.js';
import {
  applyLoad,
  type LoadFacts,
  newRecord,
  rekey,
  retire,
  savedBytes,
  type VtpmRecord,
  vtpmKey,
  vtpmOfKey,
} from '../records/index.js';
import type { AnchoredStore } from '../store/anchored-store.js';
import type { TrustStore } from '../trust/trust-configuration.js';
import { Arrivals } from './arrival.js';
import type { Census } from './census.js';
import { Departures } from './departure.js';
import { type VtpmChange, VtpmEvents } from './events.js';
import { checkFirstFrame, readHello, readUuid } from './first-frame.js';
import { type HeldRecord, LiveSession } from './live-session.js';
import { sealGrant } from './load-grant.js';
import { Slot } from './slot.js';
import { verbsOfSaves } from './state-use.js';
import { type CheckedLoad, checkAgainstRecord, checkTicket, type TicketEnvironment } from './ticket-check.js';
import { VtpmRecords } from './vtpm-records.js';
import { WorkGate } from './work-gate.js';

/** One connection of a worker. It carries one session: a second vTPM on it is refused. */
export interface WorkerConnection {
  session?: {
    readonly vtpmUuid: Uint8Array;
    readonly sessionId: Uint8Array;
    /** What the Load on this connection wrote, until its Save stream begins. */
    loaded?: HeldRecord | undefined;
  };
  isLoading?: boolean;
}

/** The manager's half of a Save stream. */
export interface SaveLink {
  /** Resolves when the stream takes more. */
  send(frame: ManagerFrame): Promise<void>;
  end(error: ManagerError): void;
}

/** A Save stream whose first frame was accepted. */
export interface AttachedStream {
  receive(frame: WorkerFrame): Promise<void>;
  /** The stream has ended. */
  detach(): void;
}

/** What an operator may know of a vTPM. */
export interface VtpmView {
  readonly header: RecordHeader;
  readonly savedBytes: number;
  readonly isConnected: boolean;
}

export interface RegistryOptions {
  readonly keys: KeyHierarchy;
  readonly store: AnchoredStore;
  readonly trust: TrustStore;
  readonly audit: Pick<AuditLog, 'append'>;
  readonly erasure: Pick<Erasure, 'note'>;
  /** Has counted the store. */
  readonly census: Census;
  /** Called before a new vTPM is made. @throws ManagerError `store-full` where the room left is for the others */
  checkRoom?(): void;
  /** For tests: another boot, another time. */
  readonly clock?: Pick<TicketEnvironment, 'bootId' | 'monotonicMs'>;
}

/** Bytes of the saves that are worked on at once: some six thousand of them, or 160 of the largest. */
const MAX_WORK_BYTES = 64 * 1024 * 1024;

/**
 * Who owns each vTPM. A Load is a compare-and-set on the epoch; only the session of the newest epoch saves, and only
 * the save that follows the last one.
 */
export class VtpmRegistry {
  readonly events = new VtpmEvents();
  readonly departures = new Departures();
  readonly arrivals = new Arrivals();
  /** Saves that are worked on. */
  readonly work = new WorkGate(MAX_WORK_BYTES);
  readonly #slots = new Map<string, Slot>();
  readonly #environment: TicketEnvironment;
  readonly #refusals: Refusals;
  readonly #records: VtpmRecords;
  #connected = 0;
  #isClosing = false;

  constructor(private readonly options: RegistryOptions) {
    this.#refusals = new Refusals(options.audit);
    this.#records = new VtpmRecords(options);
    const clock = options.clock ?? { bootId, monotonicMs };
    this.#environment = { identity: options.keys.identity, trust: options.trust, ...clock };
  }

  /**
   * Gives the vTPM on the ticket to the worker on the ticket. The answer is durable before it is returned.
   * @param admit called once, when the ticket is known to be signed by who may; what it throws refuses the Load
   */
  async load(
    request: LoadRequest,
    connection: WorkerConnection,
    admit: () => void = () => undefined,
  ): Promise<LoadResponse> {
    this.#checkOpen();
    if (connection.session || connection.isLoading) {
      throw new ManagerError(
        'bad-request',
        'this connection has its session already; one Load per connection',
      );
    }
    const checked = checkTicket(request, this.#environment, admit);
    connection.isLoading = true;
    try {
      const slot = this.#slot(checked.vtpmUuid);
      return await slot.exclusively('load', () => this.#loadInto(slot, checked, connection));
    } finally {
      checked.box.wipe();
      connection.isLoading = false;
    }
  }

  /**
   * Begins a Save stream with its first frame, HELLO or RESUME, and answers it.
   * @throws ManagerError `bad-request`; `fenced` where the session is not the vTPM's (any more), with nothing said
   * about the vTPM; `wrong-worker` where the frame is not from the session's worker; `rollback-detected`
   */
  async attach(first: WorkerFrame, link: SaveLink, connection: WorkerConnection): Promise<AttachedStream> {
    this.#checkOpen();
    if (first.type !== 'HELLO' && first.type !== 'RESUME') {
      throw new ManagerError('bad-request', `a Save stream begins with HELLO or RESUME, not ${first.type}`);
    }
    const vtpmUuid = readUuid(first);
    const bound = connection.session;
    if (
      bound &&
      !(bytesEqual(bound.vtpmUuid, first.vtpmUuid) && bytesEqual(bound.sessionId, first.sessionId))
    ) {
      throw new ManagerError('wrong-worker', 'this connection belongs to another session');
    }
    await this.#checkKnown(vtpmUuid, new ManagerError('fenced', 'this session is over'));
    const slot = this.#slot(vtpmUuid);
    const live = await slot.inOrder(() => this.#attachTo(slot, first, link, connection));
    const detach = (): void => {
      if (slot.live !== live) return;
      slot.live = undefined;
      this.#emit('link-lost', live.record.header);
    };
    try {
      await live.greet();
    } catch (error) {
      // The worker went while it was let in: nobody else would say so.
      detach();
      throw error;
    }
    return { receive: (frame) => live.receive(frame), detach };
  }

  /** Asks the connected worker to stop between two commands. */
  async freeze(vtpmUuid: string): Promise<void> {
    await this.#liveSession(vtpmUuid).freeze();
  }

  async thaw(vtpmUuid: string): Promise<void> {
    await this.#liveSession(vtpmUuid).thaw();
  }

  /** Final: key and state are dropped. @throws ManagerError `unknown-vtpm`, `busy` while a worker is connected */
  async retire(vtpmUuid: string, actor: AuditActor): Promise<void> {
    this.#checkOpen();
    await this.#checkKnown(vtpmUuid, unknownVtpm(vtpmUuid));
    const slot = this.#slot(vtpmUuid);
    await slot.exclusively('retire', async () => {
      if (slot.live) {
        throw new ManagerError('busy', `a worker is connected to vTPM ${vtpmUuid}; stop it first`);
      }
      const held = await this.#records.read(vtpmUuid);
      if (!held) throw unknownVtpm(vtpmUuid);
      if (held.record.header.kind === 'RETIRED') {
        // Whether the first one came to say so is not known: a crash may have been between.
        await this.#audit(actor, 'retire', 'done', held.record.header, { repeated: 'yes' });
        return;
      }
      const now = Date.now();
      const record = retire(held.record, BigInt(now));
      await this.#audit(actor, 'retire', 'intended', record.header);
      barrier('retire.audited');
      await this.options.erasure.note(this.options.keys.current.keyId, now);
      barrier('retire.noted');
      // Counted first: a disk from before does not bring it back.
      await this.#records.write(vtpmUuid, held, record, 'now');
      barrier('retire.written');
      await this.#audit(actor, 'retire', 'done', record.header);
      this.#emit('retired', record.header);
    });
  }

  /**
   * Puts a record in the place of the one that is there, or of none. The TPM has counted it when it resolves: no disk from
   * before brings the other one back. Whoever had the vTPM has it no more.
   * @param change from the header of now, and what the TPM's counter shows at least when it is done; undefined changes
   * nothing
   * @throws ManagerError `busy` while a worker is connected, and what `change` throws
   */
  async restore(
    vtpmUuid: string,
    actor: AuditActor,
    facts: Readonly<Record<string, string>>,
    change: (held: RecordHeader | undefined, count: bigint) => VtpmRecord | undefined,
  ): Promise<void> {
    this.#checkOpen();
    const slot = this.#slot(vtpmUuid);
    await slot.exclusively('restore', async () => {
      if (slot.live) {
        throw new ManagerError('busy', `a worker is connected to vTPM ${vtpmUuid}; stop it first`);
      }
      const held = await this.#records.read(vtpmUuid);
      const record = change(held?.record.header, this.options.store.stated.counter + 1n);
      if (!record) return;
      if (!held) this.options.checkRoom?.();
      await this.#audit(actor, 'restore', 'intended', record.header, facts);
      barrier('restore.announced');
      await this.#records.write(vtpmUuid, held, record, 'now');
      barrier('restore.written');
      await this.#audit(actor, 'restore', 'done', record.header, facts);
    });
    if (slot.isDispensable) this.#slots.delete(vtpmUuid);
  }

  /** Puts a vTPM's record under the current generation of the root key, between two of its operations. */
  async rekey(vtpmUuid: string): Promise<void> {
    this.#checkOpen();
    const slot = this.#slot(vtpmUuid);
    await slot.inOrder(async () => {
      if (slot.live?.isOver === false) return await slot.live.rekey();
      const held = await this.#records.read(vtpmUuid);
      if (!held || held.record.header.keyId === this.options.keys.current.keyId) return;
      await this.#records.write(vtpmUuid, held, rekey(this.options.keys, held.record));
    });
    // All vTPMs come by here: those that do nothing must not cost memory for ever.
    if (slot.isDispensable) this.#slots.delete(vtpmUuid);
  }

  /** Resolves when every operation that is under way now has ended; those that come later are not waited for. */
  async settled(): Promise<void> {
    await Promise.all([...this.#slots.values()].map((slot) => slot.idle()));
  }

  /** @throws ManagerError `unknown-vtpm` */
  async view(vtpmUuid: string): Promise<VtpmView> {
    const live = this.#slots.get(vtpmUuid)?.live;
    const record = await this.record(vtpmUuid);
    if (!record) throw unknownVtpm(vtpmUuid);
    return { header: record.header, savedBytes: savedBytes(record), isConnected: live !== undefined };
  }

  /** As it is durable now, whether or not a worker is connected. */
  async record(vtpmUuid: string): Promise<VtpmRecord | undefined> {
    return this.#slots.get(vtpmUuid)?.live?.record ?? (await this.#records.read(vtpmUuid))?.record;
  }

  /** UUIDs in order, behind `after`. */
  list(after: string | undefined, limit: number): string[] {
    return this.options.store
      .keys(vtpmKey(after ?? ''), limit)
      .map(vtpmOfKey)
      .filter((id) => id !== undefined);
  }

  /** How many there are. */
  get census(): Pick<Census, 'live' | 'retired'> {
    return this.options.census;
  }

  /** Workers whose Save stream is open. */
  get connected(): number {
    return this.#connected;
  }

  /** Ends every stream; resolves when no operation is under way. Workers resume with the next manager. */
  async close(
    error = new ManagerError('shutting-down', 'the manager is shutting down; resume when it is back'),
  ) {
    this.#isClosing = true;
    for (const slot of this.#slots.values()) {
      await slot.idle();
      slot.live?.end(error);
    }
    this.events.end();
    await this.#refusals.close();
  }

  async #loadInto(slot: Slot, checked: CheckedLoad, connection: WorkerConnection): Promise<LoadResponse> {
    this.#checkOpen();
    const { keys } = this.options;
    const { ticket, claim, vtpmUuid } = checked;
    const actor = actorOf({ workerKey: ticket.workerPublicKey });
    const held = await this.#records.read(vtpmUuid);
    const mode = await this.#checkLoad(checked, held?.record.header, actor);
    if (mode === 'manufacture') this.options.checkRoom?.();
    const session: Session = {
      sessionId: randomBytes(16),
      workerKey: Buffer.from(ticket.workerPublicKey),
      lastSequence: 0n,
      lastDigest: new Uint8Array(0),
      imageDigest: Buffer.from(ticket.imageDigest),
      isolation: ticket.isolation,
      verbs: verbsOfSaves(ticket.verbs),
    };
    const facts: LoadFacts = {
      vmRunId: ticket.vmRunId,
      bootId: ticket.bootId,
      session,
      libtpmsVersion: claim.libtpmsVersion,
      keepsVolatile: ticket.verbs.includes('RESUME'),
    };
    const record = held
      ? applyLoad(keys, held.record, facts)
      : newRecord(keys, ticket, facts, BigInt(Date.now()));
    // Sealed before the epoch is taken: state that does not open never costs the ticket.
    const response = sealGrant(keys, checked, record, mode === 'manufacture');
    const isDropped = held?.record.header.suspension && !record.header.suspension;
    await this.#audit(actor, 'load', 'done', record.header, {
      mode,
      isolation: ticket.isolation,
      ...(isDropped && { suspended: 'dropped' }),
    });
    barrier('load.audited');
    const loaded = await this.#records.write(vtpmUuid, held, record);
    barrier('load.written');
    connection.session = { vtpmUuid: Buffer.from(ticket.vtpmUuid), sessionId: session.sessionId, loaded };
    const { live } = slot;
    slot.live = undefined;
    this.#emit('loaded', record.header);
    live?.fence(`vTPM ${vtpmUuid} was loaded by another worker, epoch ${record.header.epoch}`);
    // The epoch is taken: a log that is full keeps its owner from nothing.
    if (live) await this.#audit('manager', 'fence', 'done', record.header).catch(() => undefined);
    return response;
  }

  /** What the ticket may not have is written down: it is signed, so somebody who is trusted asked for it. */
  async #checkLoad(checked: CheckedLoad, header: RecordHeader | undefined, actor: AuditActor) {
    try {
      return checkAgainstRecord(checked, header);
    } catch (error) {
      const record = header ?? { vtpmUuid: checked.ticket.vtpmUuid, epoch: 0n, generation: 0n };
      await this.#noteRefusal(actor, 'load', record, ManagerError.from(error));
      throw error;
    }
  }

  #noteRefusal(
    actor: AuditActor,
    action: AuditAction,
    { vtpmUuid, epoch, generation }: Pick<RecordHeader, 'vtpmUuid' | 'epoch' | 'generation'>,
    reason: ManagerError,
  ): Promise<void> {
    const vtpm = uuidToText(vtpmUuid);
    return this.#refusals.note({ actor, action, verdict: 'refused', vtpm, epoch, generation, reason });
  }

  async #audit(
    actor: AuditActor,
    action: AuditAction,
    verdict: AuditVerdict,
    { vtpmUuid, epoch, generation }: Pick<RecordHeader, 'vtpmUuid' | 'epoch' | 'generation'>,
    facts?: Readonly<Record<string, string>>,
  ): Promise<void> {
    await this.options.audit.append({
      actor,
      action,
      verdict,
      vtpm: uuidToText(vtpmUuid),
      epoch,
      generation,
      ...(facts && { facts }),
    });
  }

  async #attachTo(
    slot: Slot,
    first: WorkerFrame,
    link: SaveLink,
    connection: WorkerConnection,
  ): Promise<LiveSession> {
    this.#checkOpen();
    const { keys, store } = this.options;
    const loaded = connection.session?.loaded;
    const held =
      loaded && this.#records.isNewest(slot.vtpmUuid, loaded)
        ? loaded
        : await this.#records.read(slot.vtpmUuid);
    const header = held?.record.header;
    if (!held || !header?.session || !bytesEqual(header.session.sessionId, first.sessionId)) {
      throw new ManagerError('fenced', 'this session is over');
    }
    const { session } = header;
    const key = keys.sessionKey({ ...session, vtpmUuid: header.vtpmUuid, epoch: header.epoch });
    const cipher = sessionCipher(key, session.sessionId, header.epoch);
    wipe(key);
    checkFirstFrame(slot, session, first, readHello(cipher, first));
    slot.newestLink = { sessionId: Buffer.from(session.sessionId), number: first.sequence };
    slot.live?.end(new ManagerError('busy', 'another link of this session took over'));
    const live = new LiveSession({
      slot,
      work: this.work,
      storeKey: vtpmKey(slot.vtpmUuid),
      keys,
      store,
      cipher,
      link,
      linkNumber: first.sequence,
      held,
      audit: (action, record, facts) => this.#audit(actorOf(session), action, 'done', record, facts),
      refused: (action, record, reason) => this.#noteRefusal(actorOf(session), action, record, reason),
      onSaved: (record) => this.#emit('saved', record.header),
      onFenced: (record) => this.#emit('fenced', record.header),
    });
    slot.live = live;
    connection.session = {
      vtpmUuid: Buffer.from(header.vtpmUuid),
      sessionId: Buffer.from(session.sessionId),
    };
    this.#emit('link-up', header);
    return live;
  }

  /** A slot stays for ever: who proved nothing must not make one for each uuid that he thinks of. */
  async #checkKnown(vtpmUuid: string, refusal: ManagerError): Promise<void> {
    if (!this.#slots.has(vtpmUuid) && !(await this.#records.read(vtpmUuid))) throw refusal;
  }

  #slot(vtpmUuid: string): Slot {
    let slot = this.#slots.get(vtpmUuid);
    if (!slot) {
      slot = new Slot(vtpmUuid, (isConnected) => {
        this.#connected += isConnected ? 1 : -1;
      });
      this.#slots.set(vtpmUuid, slot);
    }
    return slot;
  }

  #liveSession(vtpmUuid: string): LiveSession {
    const live = this.#slots.get(vtpmUuid)?.live;
    if (!live) throw new ManagerError('unknown-vtpm', `no worker is connected to vTPM ${vtpmUuid}`);
    return live;
  }

  #checkOpen(): void {
    if (this.#isClosing) throw new ManagerError('shutting-down', 'the manager is shutting down; try again');
  }

  #emit(type: VtpmChange['type'], header: RecordHeader): void {
    const { epoch, generation } = header;
    this.events.emit({ type, id: uuidToText(header.vtpmUuid), epoch, generation });
  }
}

function actorOf({ workerKey }: Pick<Session, 'workerKey'>): AuditActor {
  return { worker: Buffer.from(workerKey).toString('hex').slice(0, 16) };
}

function unknownVtpm(vtpmUuid: string): ManagerError {
  return new ManagerError('unknown-vtpm', `there is no vTPM ${vtpmUuid} here`);
}
