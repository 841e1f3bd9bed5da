import { barrier } from 'vtpm-common';
import { bytesEqual, type RecordHeader, type SignedRescue, uuidToText } from 'vtpm-proto';
import type { AuditActor } from '../audit/index.js';
import { ManagerError } from '../error.js';
import { isDeparting, type VtpmRecord } from '../records/index.js';
import { acceptedAt } from './acceptance.js';
import type { Desk } from './desk.js';

/**
 * `in-doubt`: a migration of it is; `elsewhere`: it went to a third host, which may run it as the rescuer does; `unknown`: an old
 * store was accepted here, and it may be in the newest.
 */
export type GivenUp = 'over' | 'in-doubt' | 'elsewhere' | 'unknown';

/** Who has a vTPM that lived here, and since when. */
export interface GoneTo {
  /** The host that rescued it. */
  readonly destination: Uint8Array;
  /** The last one that was not the rescuer's. */
  readonly epoch: bigint;
  /** By which that host had sent it here, and not heard what became of it: it says nothing of another stay. */
  readonly sentBy?: Uint8Array | undefined;
}

/** What becomes of the records of vTPMs that were rescued: here, or from here. */
export class Rescues {
  constructor(private readonly desk: Desk) {}

  /** Notices that other hosts have not heard yet. */
  async held(): Promise<SignedRescue[]> {
    const records = await Promise.all(this.desk.census.rescued.map((id) => this.desk.known(id)));
    return records.flatMap(({ record }) => record.header.rescues);
  }

  /** A host that was dead has heard it. Durable. @param isOf whether a notice is for that host */
  async heard(vtpmUuid: string, isOf: (notice: SignedRescue) => boolean): Promise<void> {
    this.desk.checkOpen();
    const withoutNotice = ({ header, parts }: VtpmRecord): VtpmRecord => ({
      header: { ...header, rescues: header.rescues.filter((notice) => !isOf(notice)) },
      parts,
    });
    await this.desk.visit(vtpmUuid, (slot) =>
      slot.inOrder(async () => {
        // Whoever asks for what is not theirs has nothing written.
        const isHeld = ({ header }: VtpmRecord): boolean => header.rescues.some(isOf);
        if (slot.live?.isOver === false) {
          if (isHeld(slot.live.record)) await slot.live.rewrite(withoutNotice);
          return;
        }
        const held = await this.desk.records.read(vtpmUuid);
        if (held && isHeld(held.record)) {
          await this.desk.records.write(vtpmUuid, held, withoutNotice(held.record));
        }
      }),
    );
  }

  /**
   * Another host has it: the state goes, and whoever runs it here is fenced. Durable and counted.
   * @param change the tombstone in the place of the record; undefined where the record is of a later time than the rescue
   * @param facts for the audit log
   * @returns `over` where nobody runs what was rescued, as far as this host knows
   * @throws ManagerError `busy`, and what `change` throws
   */
  async giveUp(
    vtpmUuid: string,
    to: GoneTo,
    facts: Readonly<Record<string, string>>,
    change: (record: VtpmRecord, now: bigint) => VtpmRecord | undefined,
  ): Promise<GivenUp> {
    const { desk } = this;
    desk.checkOpen();
    return await desk.visit(vtpmUuid, (slot) =>
      slot.exclusively('rescue', async () => {
        const held = await desk.records.read(vtpmUuid);
        if (held && isElsewhere(held.record.header, to)) {
          await this.#noteElsewhere(held.record.header, facts);
          return 'elsewhere';
        }
        if (!held && (await acceptedAt(desk.store))) return 'unknown';
        if (held?.record.header.kind !== 'LIVE') return 'over';
        if (isDeparting(held.record.header)) return 'in-doubt';
        const now = Date.now();
        const record = change(held.record, BigInt(now));
        if (!record) return 'over';
        await desk.audit('manager', 'rescue', 'intended', record.header, facts);
        barrier('rescue.giving-up');
        await desk.noteErasure(now);
        await desk.records.write(vtpmUuid, held, record, 'now');
        barrier('rescue.given-up');
        const { live } = slot;
        slot.live = undefined;
        live?.fence(`vTPM ${uuidToText(record.header.vtpmUuid)} was rescued by another host; it lives there`);
        desk.noteDone('manager', 'rescue', record.header, facts);
        desk.emit('moved', record.header);
        return 'over';
      }),
    );
  }

  /**
   * It goes on here, without the word of the destination that it went to. Durable and counted.
   * @param change the record that goes on; undefined where it is on its way by another departure
   * @param facts for the audit log
   * @throws ManagerError `unknown-migration` where it is not on its way any more; `busy`
   */
  async takeBack(
    vtpmUuid: string,
    actor: AuditActor,
    facts: Readonly<Record<string, string>>,
    change: (record: VtpmRecord, count: bigint) => VtpmRecord | undefined,
  ): Promise<void> {
    const { desk } = this;
    desk.checkOpen();
    await desk.visit(vtpmUuid, (slot) =>
      slot.exclusively('migrate-resolve', async () => {
        const held = await desk.known(vtpmUuid);
        const isGone = isDeparting(held.record.header);
        const record = isGone ? change(held.record, desk.store.stated.counter + 1n) : undefined;
        if (!record) {
          throw new ManagerError('unknown-migration', `vTPM ${vtpmUuid} is not on its way any more`);
        }
        await desk.audit(actor, 'migrate-resolve', 'intended', record.header, facts);
        barrier('rescue.take-back.audited');
        await desk.records.write(vtpmUuid, held, record, 'now');
        barrier('rescue.take-back.written');
        desk.noteDone(actor, 'migrate-resolve', record.header, facts);
        desk.emit('stayed', record.header);
      }),
    );
  }

  /** A notice, or one of many, is not taken. At a bounded rate; never rejects. */
  async noteRefusal(rescuer: string, { code, message }: ManagerError): Promise<void> {
    const event = { actor: 'manager', action: 'rescue', verdict: 'refused' } as const;
    await this.desk.note({ ...event, reason: { code, message }, facts: { rescuer } });
  }

  async #noteElsewhere(
    { vtpmUuid, epoch, generation, departure }: RecordHeader,
    facts: Readonly<Record<string, string>>,
  ): Promise<void> {
    const livesAt = departure ? Buffer.from(departure.destination).toString('hex') : 'unknown';
    const message = 'it was rescued from here by one host, and had gone from here to another before';
    await this.desk.note({
      actor: 'manager',
      action: 'rescue',
      verdict: 'refused',
      vtpm: uuidToText(vtpmUuid),
      epoch,
      generation,
      reason: { code: 'moved', message },
      facts: { ...facts, livesAt },
    });
  }
}

/** A later tombstone is of a time after the rescue: it came back before it went there. */
function isElsewhere(header: RecordHeader, to: GoneTo): boolean {
  const { kind, departure, epoch } = header;
  if (kind !== 'MOVED' || epoch > to.epoch || !cameFrom(header, to)) return false;
  return !departure || !bytesEqual(departure.destination, to.destination);
}

/** Whether it is the stay that the host which has it now speaks of. */
export function cameFrom({ unsettled }: RecordHeader, { destination, sentBy }: GoneTo): boolean {
  if (!sentBy) return true;
  return unsettled.some(
    ({ migrationId, source }) => bytesEqual(migrationId, sentBy) && bytesEqual(source, destination),
  );
}
