import { barrier } from 'vtpm-common';
import {
  bytesEqual,
  type Departure,
  type MigrateOrder,
  type MigrationDecision,
  type RecordHeader,
  type SignedDecision,
  type Suspension,
  uuidToBytes,
  uuidToText,
} from 'vtpm-proto';
import type { AuditActor, AuditHead } from '../audit/index.js';
import { ManagerError } from '../error.js';
import { wipe } from '../keys/index.js';
import { checkDecision } from '../migration/decision.js';
import {
  depart,
  isDeparting,
  MAX_UNSETTLED,
  movedAway,
  savedBytes,
  type TravellingState,
  thawed,
  travelling,
  type VtpmRecord,
} from '../records/index.js';
import { type Desk, unknownVtpm } from './desk.js';
import type { Slot } from './slot.js';
import { checkHere } from './ticket-check.js';
import type { HeldRecord } from './vtpm-records.js';

/** Milliseconds that a worker has for its last save; then it goes on. */
const SUSPEND_MS = 10_000;

/** What a migration is prepared with. */
export interface DepartureFacts {
  readonly vtpmUuid: string;
  readonly vmUuid: Uint8Array;
  readonly vmRunId: Uint8Array;
  readonly epoch: bigint;
  readonly generation: bigint;
  readonly libtpmsVersion: string;
  /** As it is sealed now; saves until the freeze may make it more. */
  readonly stateBytes: number;
  readonly isConnected: boolean;
  readonly isSuspended: boolean;
}

/** A vTPM that nobody runs here until its destination has said what it decided. */
export interface PendingDeparture {
  readonly vtpmUuid: string;
  /** Of the state that went. */
  readonly epoch: bigint;
  readonly generation: bigint;
  readonly departure: Departure;
}

/** Where a vTPM goes, and how. */
export type Destination = Omit<Departure, 'epoch' | 'generation'>;

/** What a worker left when it stopped. */
interface Frozen {
  readonly generation: bigint;
  readonly sessionId: Uint8Array;
  readonly suspension: Suspension | undefined;
}

/** An intention in the log. */
interface Announced {
  readonly migrationId: Uint8Array;
  readonly head: AuditHead;
}

/**
 * How vTPMs leave. Each step that counts is durable, counted by the TPM and in the audit log before it is said: from
 * `depart` on nobody runs the vTPM here, whatever crashes, until the destination's own word ends it.
 */
export class Departures {
  readonly #frozen = new Map<string, Frozen>();
  /** What the log says already of those that are about to go, by vTPM. */
  readonly #announced = new Map<string, Announced>();
  /** Whether these were written, only the next start can read. */
  readonly #unread = new Map<string, PendingDeparture>();

  constructor(private readonly desk: Desk) {}

  /**
   * Whether the vTPM may go as ordered; changes nothing. The order's signature is the caller's to check.
   * @throws ManagerError `unknown-vtpm`, `retired`, `moved`, `migrating`, `wrong-vm`, `stale-epoch`, `rollback-detected`,
   * `busy`, `in-doubt`, `migration-refused`
   */
  async check(order: MigrateOrder): Promise<DepartureFacts> {
    this.desk.checkOpen();
    const vtpmUuid = uuidToText(order.vtpmUuid);
    const live = this.desk.slotOf(vtpmUuid)?.live;
    const record = live?.record ?? (await this.desk.known(vtpmUuid)).record;
    const { header } = record;
    this.#checkMayGo(vtpmUuid, header, order.destination);
    if (!bytesEqual(header.vmUuid, order.vmUuid)) {
      throw new ManagerError('wrong-vm', `vTPM ${vtpmUuid} belongs to another VM than the order names`);
    }
    if (header.epoch !== order.expectedEpoch) {
      throw new ManagerError(
        'stale-epoch',
        `vTPM ${vtpmUuid} is at epoch ${header.epoch}, the order expects ${order.expectedEpoch}; order it anew`,
      );
    }
    if (header.generation < order.leastGeneration) {
      throw new ManagerError(
        'rollback-detected',
        `vTPM ${vtpmUuid} is at generation ${header.generation}, the order knows of ${order.leastGeneration}`,
      );
    }
    if (order.mode === 'OFFLINE' && live) throw stillConnected(vtpmUuid);
    return {
      vtpmUuid,
      vmUuid: header.vmUuid,
      vmRunId: header.vmRunId,
      epoch: header.epoch,
      generation: header.generation,
      libtpmsVersion: header.libtpmsVersion,
      stateBytes: savedBytes(record),
      isConnected: live !== undefined,
      isSuspended: header.suspension !== undefined,
    };
  }

  /** Resolves when the VMM has taken the TPM out. @throws ManagerError `migration-aborted` where `signal` came first */
  async awaitSuspend(vtpmUuid: string, signal: AbortSignal): Promise<void> {
    this.desk.checkOpen();
    const isSuspended = (): boolean =>
      this.desk.slotOf(vtpmUuid)?.live?.record.header.suspension !== undefined;
    await new Promise<void>((resolve, reject) => {
      const check = (): void => {
        if (!isSuspended()) return;
        unsubscribe();
        signal.removeEventListener('abort', abort);
        resolve();
      };
      const abort = (): void => {
        unsubscribe();
        reject(aborted(vtpmUuid, 'it was given up before the VMM took the TPM out'));
      };
      const unsubscribe = this.desk.events.subscribe(check, abort);
      signal.addEventListener('abort', abort, { once: true });
      if (signal.aborted) abort();
      else check();
    });
  }

  /** Writes into the log what is about to be done, while the vTPM runs on: `depart` needs not wait for it then. */
  async announce(vtpmUuid: string, destination: Destination, actor: AuditActor = 'manager'): Promise<void> {
    this.desk.checkOpen();
    const { header } = this.desk.slotOf(vtpmUuid)?.live?.record ?? (await this.desk.known(vtpmUuid)).record;
    const head = await this.desk.audit(actor, 'freeze', 'intended', header, factsOf(destination));
    this.#announced.set(vtpmUuid, { migrationId: destination.migrationId, head });
  }

  /** It does not go after all. */
  renounce(vtpmUuid: string): void {
    this.#announced.delete(vtpmUuid);
  }

  /**
   * Has the connected worker stop with all of its TPM saved.
   * @returns `none` where no worker is connected
   * @throws ManagerError `migration-aborted` where it went or did not answer in time: nothing has changed
   */
  async suspend(vtpmUuid: string, limitMs = SUSPEND_MS): Promise<'frozen' | 'none'> {
    this.desk.checkOpen();
    this.#frozen.delete(vtpmUuid);
    const live = this.desk.slotOf(vtpmUuid)?.live;
    if (!live) return 'none';
    barrier('migrate.suspend');
    const { header } = await live.suspend(limitMs);
    barrier('migrate.suspended');
    const { generation, session, suspension } = header;
    if (!session) throw aborted(vtpmUuid, 'its session is over');
    this.#frozen.set(vtpmUuid, { generation, suspension, sessionId: session.sessionId });
    return 'frozen';
  }

  /** The worker goes on where it stopped. Before `depart` only; nothing where none is connected. */
  async thawWorker(vtpmUuid: string): Promise<void> {
    this.#frozen.delete(vtpmUuid);
    await this.desk.slotOf(vtpmUuid)?.live?.thaw();
  }

  /**
   * From now on nobody runs it here: durable and counted by the TPM when it resolves. Where it rejects, `pending` says whether
   * it may be written. It is done where the record is the one
   * that the worker left when it stopped, or nobody is connected in mode OFFLINE.
   * @returns what travels; the caller wipes it
   * @throws ManagerError as `check`, `migration-aborted` where the worker has gone on, the store's
   */
  async depart(
    vtpmUuid: string,
    destination: Destination,
    actor: AuditActor = 'manager',
  ): Promise<TravellingState> {
    this.desk.checkOpen();
    await this.desk.checkKnown(vtpmUuid, unknownVtpm(vtpmUuid));
    const slot = this.desk.slot(vtpmUuid);
    return await slot.exclusively('migrate-out', async () => {
      const frozen = this.#frozen.get(vtpmUuid);
      this.#frozen.delete(vtpmUuid);
      const held = await this.desk.known(vtpmUuid);
      const { record } = held;
      this.#checkMayGo(vtpmUuid, record.header, destination.destination);
      checkStopped(slot, record.header, destination, frozen);
      const facts = factsOf(destination);
      const announced = this.#announced.get(vtpmUuid);
      const head =
        announced && bytesEqual(announced.migrationId, destination.migrationId)
          ? announced.head
          : await this.desk.audit(actor, 'freeze', 'intended', record.header, facts);
      this.#announced.delete(vtpmUuid);
      // Opened before anything is said: a state that does not open never leaves.
      const state = travelling(this.desk.keys, record, {
        host: this.desk.keys.hostKey.publicKey,
        auditHead: head.digest,
        auditLength: head.length,
        migrationId: destination.migrationId,
      });
      const next = depart(record, destination);
      try {
        await this.#write('depart', vtpmUuid, held, next);
      } catch (error) {
        wipe(state.parts.PERMANENT, state.parts.VOLATILE, state.parts.REFERENCE_KEY);
        if (!(await this.#isReadable(vtpmUuid))) this.#unread.set(vtpmUuid, pendingOf(next.header));
        throw error;
      }
      this.desk.noteDone(actor, 'freeze', next.header, facts);
      const { live } = slot;
      slot.live = undefined;
      live?.fence(`vTPM ${vtpmUuid} is on its way to another host`);
      this.desk.emit('departing', next.header);
      return state;
    });
  }

  /**
   * It lives here again, at the next epoch. Durable and counted when it resolves.
   * @throws ManagerError `unknown-migration` where it is not on its way; `decision-forged` where the destination did not sign
   * that very departure off
   */
  async abort(vtpmUuid: string, signed: SignedDecision): Promise<void> {
    await this.#end(vtpmUuid, signed, 'ABORT', async (held, departure) => {
      const next = thawed(held.record);
      const facts = factsOf(departure);
      await this.desk.audit('manager', 'migrate-abort', 'intended', next.header, facts);
      await this.#write('thaw', vtpmUuid, held, next);
      this.desk.noteDone('manager', 'migrate-abort', next.header, facts);
      this.desk.emit('stayed', next.header);
    });
  }

  /**
   * It lives at the destination: key and state are dropped here, and a tombstone says where to. Durable and counted when it
   * resolves. May be repeated.
   * @throws ManagerError as `abort`
   */
  async commit(vtpmUuid: string, signed: SignedDecision): Promise<void> {
    await this.#end(vtpmUuid, signed, 'COMMIT', async (held, departure) => {
      const now = Date.now();
      const next = movedAway(held.record, departure, BigInt(now));
      const facts = factsOf(departure);
      await this.desk.audit('manager', 'migrate-commit', 'intended', next.header, facts);
      await this.desk.noteErasure(now);
      await this.#write('moved', vtpmUuid, held, next);
      this.desk.noteDone('manager', 'migrate-commit', next.header, facts);
      this.desk.emit('moved', next.header);
    });
  }

  /**
   * Those that wait for the word of their destination, from before a restart too, and those of which the store does not say
   * any more whether they do.
   */
  async pending(): Promise<PendingDeparture[]> {
    const records = await Promise.all(this.desk.census.departing.map((id) => this.desk.records.read(id)));
    const written = records.flatMap((held) => {
      const header = held?.record.header;
      return header && isDeparting(header) ? [pendingOf(header)] : [];
    });
    return [...written, ...this.#unread.values()];
  }

  #checkMayGo(vtpmUuid: string, header: RecordHeader, destination: Uint8Array): void {
    checkHere(vtpmUuid, header);
    if (header.generation === 0n) {
      throw new ManagerError(
        'migration-refused',
        `vTPM ${vtpmUuid} has no state yet; start it once first, or create it on the host where it is to run`,
      );
    }
    if (header.unsettled.length >= MAX_UNSETTLED) {
      throw new ManagerError(
        'in-doubt',
        `vTPM ${vtpmUuid} came from ${header.unsettled.length} hosts that have not settled it; run: vtpmctl migrate resolve ${vtpmUuid}`,
      );
    }
    if (bytesEqual(destination, this.desk.keys.hostKey.publicKey)) {
      throw new ManagerError('bad-request', `vTPM ${vtpmUuid} is on the host that it is to move to`);
    }
  }

  async #end(
    vtpmUuid: string,
    signed: SignedDecision,
    verdict: MigrationDecision['verdict'],
    change: (held: HeldRecord, departure: Departure) => Promise<void>,
  ): Promise<void> {
    this.desk.checkOpen();
    await this.desk.checkKnown(vtpmUuid, unknownVtpm(vtpmUuid));
    await this.desk.slot(vtpmUuid).inOrder(async () => {
      const held = await this.desk.known(vtpmUuid);
      const { kind, departure } = held.record.header;
      if (kind === 'RETIRED' || !departure) {
        throw new ManagerError('unknown-migration', `vTPM ${vtpmUuid} is not on its way anywhere`);
      }
      const names = {
        ...departure,
        source: this.desk.keys.hostKey.publicKey,
        vtpmUuid: uuidToBytes(vtpmUuid),
      };
      const decision = checkDecision(signed, names);
      if (decision.verdict !== verdict) {
        throw new ManagerError(
          'bad-request',
          `the destination of vTPM ${vtpmUuid} decided ${decision.verdict}`,
        );
      }
      if (kind === 'MOVED' && verdict === 'COMMIT') return;
      checkIsOnItsWay(vtpmUuid, held.record);
      await change(held, departure);
    });
  }

  /** A store that refuses one write can be read; one that does not know what it wrote cannot. */
  async #isReadable(vtpmUuid: string): Promise<boolean> {
    return await this.desk.records.read(vtpmUuid).then(
      () => true,
      () => false,
    );
  }

  /** Counted first: no disk from before brings back what was so then. */
  async #write(
    step: 'depart' | 'thaw' | 'moved',
    vtpmUuid: string,
    held: HeldRecord,
    next: VtpmRecord,
  ): Promise<void> {
    barrier(`migrate.${step}.audited`);
    await this.desk.records.write(vtpmUuid, held, next, 'now');
    barrier(`migrate.${step}.written`);
  }
}

function pendingOf({
  vtpmUuid,
  departure,
}: RecordHeader & { readonly departure: Departure }): PendingDeparture {
  const { epoch, generation } = departure;
  return { vtpmUuid: uuidToText(vtpmUuid), epoch, generation, departure };
}

function checkIsOnItsWay(vtpmUuid: string, { header }: VtpmRecord): void {
  if (isDeparting(header)) return;
  throw new ManagerError('unknown-migration', `vTPM ${vtpmUuid} is not on its way any more`);
}

/** Whether the record is all that there is of the TPM. @throws ManagerError `busy`, `migration-aborted`, `incomplete` */
function checkStopped(
  { vtpmUuid, live }: Slot,
  header: RecordHeader,
  { mode }: Destination,
  frozen: Frozen | undefined,
): void {
  if (mode === 'OFFLINE') {
    if (live) throw stillConnected(vtpmUuid);
    return;
  }
  const { session, suspension, generation } = header;
  const isAsLeft =
    frozen !== undefined &&
    session !== undefined &&
    bytesEqual(session.sessionId, frozen.sessionId) &&
    generation === frozen.generation &&
    suspension?.generation === frozen.suspension?.generation;
  if (!isAsLeft) throw aborted(vtpmUuid, 'its worker went on after it had stopped');
  if (mode === 'VMM' && !suspension) {
    throw new ManagerError('incomplete', `vTPM ${vtpmUuid} was not taken out by its VMM; it goes on here`);
  }
}

function factsOf({ migrationId, destination, mode }: Destination): Record<string, string> {
  return { migration: hex(migrationId), to: hex(destination), mode };
}

function hex(bytes: Uint8Array): string {
  return Buffer.from(bytes).toString('hex');
}

function aborted(vtpmUuid: string, why: string): ManagerError {
  return new ManagerError('migration-aborted', `vTPM ${vtpmUuid} does not move: ${why}`);
}

function stillConnected(vtpmUuid: string): ManagerError {
  return new ManagerError('busy', `a worker is connected to vTPM ${vtpmUuid}; stop it, or move it live`);
}
