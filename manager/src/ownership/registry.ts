import { barrier, bootId, monotonicMs } from 'vtpm-common';
import {
  bytesEqual,
  type LoadRequest,
  type LoadResponse,
  type ManagerFrame,
  type RecordHeader,
  type Session,
  sessionCipher,
  type WorkerFrame,
} from 'vtpm-proto';
import type { AuditActor } from '../audit/index.js';
import { ManagerError } from '../error.js';
import { wipe } from '../keys/index.js';
import {
  applyLoad,
  isDeparting,
  newRecord,
  rekey,
  retire,
  savedBytes,
  type VtpmRecord,
  vtpmKey,
  vtpmOfKey,
} from '../records/index.js';
import type { TrustStore } from '../trust/trust-configuration.js';
import { Arrivals } from './arrival.js';
import type { Census } from './census.js';
import { Departures } from './departure.js';
import { Desk, type DeskOptions, unknownVtpm } from './desk.js';
import type { VtpmEvents } from './events.js';
import { checkFirstFrame, readHello, readUuid } from './first-frame.js';
import { LiveSession } from './live-session.js';
import { sealGrant } from './load-grant.js';
import { Rescues } from './rescues.js';
import type { Slot } from './slot.js';
import {
  type CheckedLoad,
  checkAgainstRecord,
  checkHere,
  checkTicket,
  type LoadableHeader,
  loadFactsOf,
  type TicketEnvironment,
} from './ticket-check.js';
import type { HeldRecord } from './vtpm-records.js';
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

/** A Load that may have to wait longer than others. */
export interface LoadCall {
  /** The caller is gone. */
  readonly signal: AbortSignal;
  /** The answer may take so many milliseconds more. */
  extend(milliseconds: number): void;
}

export interface RegistryOptions extends DeskOptions {
  readonly trust: TrustStore;
  /** For tests: another boot, another time. */
  readonly clock?: Pick<TicketEnvironment, 'bootId' | 'monotonicMs'>;
}

/** Of a caller that is known not to go, and has all the time. */
const PATIENT: LoadCall = { signal: new AbortController().signal, extend: () => undefined };

/** Bytes of the saves that are worked on at once: some six thousand of them, or 160 of the largest. */
const MAX_WORK_BYTES = 64 * 1024 * 1024;

/**
 * Who owns each vTPM. A Load is a compare-and-set on the epoch; only the session of the newest epoch saves, and only
 * the save that follows the last one.
 */
export class VtpmRegistry {
  readonly departures: Departures;
  readonly arrivals: Arrivals;
  readonly rescues: Rescues;
  /** Saves that are worked on. */
  readonly work = new WorkGate(MAX_WORK_BYTES);
  readonly #desk: Desk;
  readonly #environment: TicketEnvironment;

  constructor(private readonly options: RegistryOptions) {
    this.#desk = new Desk(options);
    this.departures = new Departures(this.#desk);
    this.arrivals = new Arrivals(this.#desk);
    this.rescues = new Rescues(this.#desk);
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
    call: LoadCall = PATIENT,
  ): Promise<LoadResponse> {
    this.#desk.checkOpen();
    if (connection.session || connection.isLoading) {
      throw new ManagerError(
        'bad-request',
        'this connection has its session already; one Load per connection',
      );
    }
    let found: Promise<HeldRecord | undefined> | undefined;
    const checked = checkTicket(request, this.#environment, (vtpmUuid) => {
      admit();
      // The store looks for it while the rest of the Load is checked.
      found = this.#desk.records.read(vtpmUuid);
      found.catch(() => undefined);
    });
    connection.isLoading = true;
    try {
      const { vtpmUuid } = checked;
      const place = this.arrivals.placeOf(vtpmUuid);
      if (place) {
        await this.#checkLoad(checked, place.header);
        return await place.wait({ checked, connection, call });
      }
      const slot = this.#desk.slot(vtpmUuid);
      return await slot.exclusively('load', () => this.#loadInto(slot, checked, connection, found));
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
    this.#desk.checkOpen();
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
    await this.#desk.checkKnown(vtpmUuid, new ManagerError('fenced', 'this session is over'));
    const slot = this.#desk.slot(vtpmUuid);
    const live = await slot.inOrder(() => this.#attachTo(slot, first, link, connection));
    const detach = (): void => {
      if (slot.live !== live) return;
      slot.live = undefined;
      live.detached();
      this.#desk.emit('link-lost', live.record.header);
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

  /**
   * Final: key and state are dropped.
   * @throws ManagerError `unknown-vtpm`, `busy` while a worker is connected, `migrating` while it is on its way elsewhere
   */
  async retire(vtpmUuid: string, actor: AuditActor): Promise<void> {
    this.#desk.checkOpen();
    await this.#desk.checkKnown(vtpmUuid, unknownVtpm(vtpmUuid));
    const slot = this.#desk.slot(vtpmUuid);
    await slot.exclusively('retire', async () => {
      if (slot.live) {
        throw new ManagerError('busy', `a worker is connected to vTPM ${vtpmUuid}; stop it first`);
      }
      const held = await this.#desk.known(vtpmUuid);
      if (held.record.header.kind === 'RETIRED') {
        // Whether the first one came to say so is not known: a crash may have been between.
        await this.#desk.audit(actor, 'retire', 'done', held.record.header, { repeated: 'yes' });
        return;
      }
      // What became of it is not known: where it lives elsewhere it is not for this host to end it.
      if (isDeparting(held.record.header)) checkHere(vtpmUuid, held.record.header);
      const now = Date.now();
      const record = retire(held.record, BigInt(now));
      await this.#desk.audit(actor, 'retire', 'intended', record.header);
      barrier('retire.audited');
      await this.#desk.noteErasure(now);
      barrier('retire.noted');
      // Counted first: a disk from before does not bring it back.
      await this.#desk.records.write(vtpmUuid, held, record, 'now');
      barrier('retire.written');
      await this.#desk.audit(actor, 'retire', 'done', record.header);
      this.#desk.emit('retired', record.header);
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
    action: 'restore' | 'rescue' = 'restore',
  ): Promise<void> {
    this.#desk.checkOpen();
    await this.#desk.visit(vtpmUuid, (slot) =>
      slot.exclusively(action, async () => {
        if (slot.live) {
          throw new ManagerError('busy', `a worker is connected to vTPM ${vtpmUuid}; stop it first`);
        }
        const held = await this.#desk.records.read(vtpmUuid);
        const record = change(held?.record.header, this.options.store.stated.counter + 1n);
        if (!record) return;
        if (!held) this.options.checkRoom?.();
        await this.#desk.audit(actor, action, 'intended', record.header, facts);
        barrier(`${action}.announced`);
        await this.#desk.records.write(vtpmUuid, held, record, 'now');
        barrier(`${action}.written`);
        await this.#desk.audit(actor, action, 'done', record.header, facts);
      }),
    );
  }

  /** Puts a vTPM's record under the current generation of the root key, between two of its operations. */
  async rekey(vtpmUuid: string): Promise<void> {
    this.#desk.checkOpen();
    // All vTPMs come by here: those that do nothing must not cost memory for ever.
    await this.#desk.visit(vtpmUuid, (slot) =>
      slot.inOrder(async () => {
        if (slot.live?.isOver === false) return await slot.live.rekey();
        const held = await this.#desk.records.read(vtpmUuid);
        if (!held || held.record.header.keyId === this.options.keys.current.keyId) return;
        await this.#desk.records.write(vtpmUuid, held, rekey(this.options.keys, held.record));
      }),
    );
  }

  /** Resolves when every operation that is under way now has ended; those that come later are not waited for. */
  async settled(): Promise<void> {
    await this.#desk.settled();
  }

  /** @throws ManagerError `unknown-vtpm` */
  async view(vtpmUuid: string): Promise<VtpmView> {
    const live = this.#desk.slotOf(vtpmUuid)?.live;
    const record = await this.record(vtpmUuid);
    if (!record) throw unknownVtpm(vtpmUuid);
    return { header: record.header, savedBytes: savedBytes(record), isConnected: live !== undefined };
  }

  /** As it is durable now, whether or not a worker is connected. */
  async record(vtpmUuid: string): Promise<VtpmRecord | undefined> {
    return this.#desk.slotOf(vtpmUuid)?.live?.record ?? (await this.#desk.records.read(vtpmUuid))?.record;
  }

  /** UUIDs in order, behind `after`. */
  list(after: string | undefined, limit: number): string[] {
    return this.options.store
      .keys(vtpmKey(after ?? ''), limit)
      .map(vtpmOfKey)
      .filter((id) => id !== undefined);
  }

  get events(): VtpmEvents {
    return this.#desk.events;
  }

  /** How many there are. */
  get census(): Pick<Census, 'live' | 'retired' | 'moved'> {
    return this.options.census;
  }

  /** Workers whose Save stream is open. */
  get connected(): number {
    return this.#desk.connected;
  }

  /** Ends every stream; resolves when no operation is under way. Workers resume with the next manager. */
  async close(
    error = new ManagerError('shutting-down', 'the manager is shutting down; resume when it is back'),
  ) {
    this.arrivals.close(error);
    await this.#desk.close(error);
  }

  /** @param found the record as it was before the vTPM was this Load's alone */
  async #loadInto(
    slot: Slot,
    checked: CheckedLoad,
    connection: WorkerConnection,
    found: Promise<HeldRecord | undefined> | undefined,
  ): Promise<LoadResponse> {
    this.#desk.checkOpen();
    const { keys } = this.options;
    const { ticket, vtpmUuid } = checked;
    const actor = actorOf({ workerKey: ticket.workerPublicKey });
    const held = await this.#desk.records.newest(vtpmUuid, await found);
    const mode = await this.#checkLoad(checked, held?.record.header);
    if (mode === 'manufacture') this.options.checkRoom?.();
    const facts = loadFactsOf(checked);
    const { session } = facts;
    const record = held
      ? applyLoad(keys, held.record, facts)
      : newRecord(keys, ticket, facts, BigInt(Date.now()));
    // Sealed before the epoch is taken: state that does not open never costs the ticket.
    const response = sealGrant(keys, checked, record, mode === 'manufacture');
    const isDropped = held?.record.header.suspension && !record.header.suspension;
    await this.#desk.audit(actor, 'load', 'done', record.header, {
      mode,
      isolation: ticket.isolation,
      ...(isDropped && { suspended: 'dropped' }),
    });
    barrier('load.audited');
    const loaded = await this.#desk.records.write(vtpmUuid, held, record);
    barrier('load.written');
    connection.session = { vtpmUuid: Buffer.from(ticket.vtpmUuid), sessionId: session.sessionId, loaded };
    const { live } = slot;
    slot.live = undefined;
    this.#desk.emit('loaded', record.header);
    live?.fence(`vTPM ${vtpmUuid} was loaded by another worker, epoch ${record.header.epoch}`);
    // The epoch is taken: a log that is full keeps its owner from nothing.
    if (live) await this.#desk.audit('manager', 'fence', 'done', record.header).catch(() => undefined);
    return response;
  }

  /** What the ticket may not have is written down: it is signed, so somebody who is trusted asked for it. */
  async #checkLoad(checked: CheckedLoad, header: LoadableHeader | undefined) {
    try {
      return checkAgainstRecord(checked, header);
    } catch (error) {
      const { vtpmUuid, workerPublicKey } = checked.ticket;
      const { epoch, generation } = header ?? { epoch: 0n, generation: 0n };
      const record = { vtpmUuid, epoch, generation };
      const actor = actorOf({ workerKey: workerPublicKey });
      await this.#desk.noteRefusal(actor, 'load', record, ManagerError.from(error));
      throw error;
    }
  }

  async #attachTo(
    slot: Slot,
    first: WorkerFrame,
    link: SaveLink,
    connection: WorkerConnection,
  ): Promise<LiveSession> {
    this.#desk.checkOpen();
    const { keys } = this.options;
    const held = await this.#desk.records.newest(slot.vtpmUuid, connection.session?.loaded);
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
      keys,
      records: this.#desk.records,
      cipher,
      link,
      linkNumber: first.sequence,
      held,
      audit: async (action, record, facts) => {
        await this.#desk.audit(actorOf(session), action, 'done', record, facts);
      },
      refused: (action, record, reason) => this.#desk.noteRefusal(actorOf(session), action, record, reason),
      onSaved: (record) => this.#desk.emit('saved', record.header),
      onFenced: (record) => this.#desk.emit('fenced', record.header),
    });
    slot.live = live;
    connection.session = {
      vtpmUuid: Buffer.from(header.vtpmUuid),
      sessionId: Buffer.from(session.sessionId),
    };
    this.#desk.emit('link-up', header);
    return live;
  }
}

function actorOf({ workerKey }: Pick<Session, 'workerKey'>): AuditActor {
  return { worker: Buffer.from(workerKey).toString('hex').slice(0, 16) };
}
