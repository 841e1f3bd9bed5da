import { barrier } from 'vtpm-common';
import { type SignedRescue, uuidToText } from 'vtpm-proto';
import { isDeparting, type VtpmRecord } from '../records/index.js';
import type { Desk } from './desk.js';

/** What becomes of the records of vTPMs that were rescued: here, or from here. */
export class Rescues {
  constructor(private readonly desk: Desk) {}

  /** Notices that other hosts have not heard yet. */
  async held(): Promise<SignedRescue[]> {
    const records = await Promise.all(this.desk.census.rescued.map((id) => this.desk.known(id)));
    return records.flatMap(({ record }) => (record.header.rescue ? [record.header.rescue] : []));
  }

  /** The host that was dead has heard it. Durable. */
  async heard(vtpmUuid: string): Promise<void> {
    this.desk.checkOpen();
    await this.desk.visit(vtpmUuid, (slot) =>
      slot.inOrder(async () => {
        if (slot.live?.isOver === false) return await slot.live.rewrite(withoutNotice);
        const held = await this.desk.records.read(vtpmUuid);
        if (held?.record.header.rescue) {
          await this.desk.records.write(vtpmUuid, held, withoutNotice(held.record));
        }
      }),
    );
  }

  /**
   * Another host has it: the state goes, and whoever runs it here is fenced. Durable and counted.
   * @param change the tombstone in the place of the record; undefined where the record is of a later time than the rescue
   * @param facts for the audit log
   * @returns whether nobody runs here what was rescued: false while a migration of it is in doubt
   * @throws ManagerError `busy`
   */
  async giveUp(
    vtpmUuid: string,
    facts: Readonly<Record<string, string>>,
    change: (record: VtpmRecord, now: bigint) => VtpmRecord | undefined,
  ): Promise<boolean> {
    const { desk } = this;
    desk.checkOpen();
    return await desk.visit(vtpmUuid, (slot) =>
      slot.exclusively('rescue', async () => {
        const held = await desk.records.read(vtpmUuid);
        if (held?.record.header.kind !== 'LIVE') return true;
        if (isDeparting(held.record.header)) return false;
        const now = Date.now();
        const record = change(held.record, BigInt(now));
        if (!record) return true;
        await desk.audit('manager', 'rescue', 'intended', record.header, facts);
        barrier('rescue.giving-up');
        await desk.noteErasure(now);
        await desk.records.write(vtpmUuid, held, record, 'now');
        barrier('rescue.given-up');
        const { live } = slot;
        slot.live = undefined;
        live?.fence(`vTPM ${uuidToText(record.header.vtpmUuid)} was rescued by another host; it lives there`);
        await desk.audit('manager', 'rescue', 'done', record.header, facts);
        desk.emit('moved', record.header);
        return true;
      }),
    );
  }
}

function withoutNotice({ header: { rescue: _rescue, ...header }, parts }: VtpmRecord): VtpmRecord {
  return { header, parts };
}
