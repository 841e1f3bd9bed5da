import type { Logger } from 'vtpm-common';
import {
  bytesEqual,
  type Peer,
  type RecordHeader,
  type SignedFencing,
  type SignedRescue,
  uuidToText,
} from 'vtpm-proto';
import { statusOf } from '../admin/http.js';
import type { AuditActor, AuditEvent, AuditLog } from '../audit/index.js';
import { contentOf } from '../backup/format.js';
import { ManagerError } from '../error.js';
import type { KeyHierarchy } from '../keys/index.js';
import type { PendingDeparture } from '../ownership/departure.js';
import type { VtpmRegistry } from '../ownership/registry.js';
import { cameFrom, type GoneTo } from '../ownership/rescues.js';
import { movedAway, NO_MIGRATION, type VtpmRecord } from '../records/index.js';
import { checkRight, unknownPeer } from '../trust/peers.js';
import type { TrustStore } from '../trust/trust-configuration.js';
import type { RescueBook, TakesBack } from './exchange.js';
import { parseNotice, verifiedNotice } from './notice.js';
import { checkPlace, rescuedRecord } from './record.js';
import { type CheckedRescue, checkRescue } from './request.js';
import { checkDestinationFenced, takeBack } from './take-back.js';

export interface RescueParts {
  readonly keys: KeyHierarchy;
  readonly trust: Pick<TrustStore, 'isToolstackKeyTrusted' | 'peerById'>;
  readonly registry: VtpmRegistry;
  readonly audit: Pick<AuditLog, 'append'>;
  readonly log: Logger;
  /** Something is to be told to a host that was dead. */
  onHeld(): void;
}

/** What a rescue does, or would do. */
export interface RescuePlan {
  readonly id: string;
  readonly vmUuid: string;
  /** Name of the peer that is dead. */
  readonly from: string;
  /** Of the backup. */
  readonly generation: bigint;
  /** As the statement has it: what came between is lost. */
  readonly lastGeneration: bigint;
  readonly savedAt: bigint;
  /** With which it goes on, once it is done. */
  readonly next: bigint | undefined;
  readonly epoch: bigint | undefined;
}

/** Rescues vTPMs of hosts that are dead, and ends those here that were rescued while this host was. */
export class RescueControl implements RescueBook, TakesBack {
  constructor(private readonly parts: RescueParts) {}

  /** What a rescue would do; changes nothing. @throws ManagerError that says why it would be refused */
  async plan(bytes: Uint8Array): Promise<RescuePlan> {
    const checked = checkRescue(bytes, this.parts);
    const id = uuidToText(checked.facts.vtpmUuid);
    checkPlace(id, (await this.parts.registry.record(id))?.header, checked.peer);
    return planOf(checked, undefined);
  }

  /**
   * Has a vTPM whose host is dead go on here, from a backup that host made. The TPM has counted it when it resolves.
   * @throws ManagerError `not-fenced`, `unknown-peer`, `wrong-manager`, `lives-here`, `moved`, `in-doubt`, `retired`,
   * `bad-request`
   */
  async rescue(actor: AuditActor, bytes: Uint8Array): Promise<RescuePlan> {
    const { keys, registry, audit, log, onHeld } = this.parts;
    let event: Omit<AuditEvent, 'verdict'> = { actor, action: 'rescue' };
    try {
      const checked = checkRescue(bytes, this.parts);
      const { facts, statement, peer } = checked;
      const id = uuidToText(facts.vtpmUuid);
      const audited = {
        from: peer.name,
        host: hex(peer.hostId),
        backup: hex(checked.restore.headerDigest).slice(0, 32),
        generation: String(facts.generation),
        lastGeneration: String(statement.lastGeneration),
        method: statement.method,
        fenced: new Date(Number(statement.at)).toISOString(),
      };
      event = { ...event, vtpm: id, facts: audited };
      checkPlace(id, (await registry.record(id))?.header, peer);
      const permanent = contentOf(facts, checked.restore);
      let made: RecordHeader | undefined;
      const change = (held: RecordHeader | undefined, count: bigint): VtpmRecord => {
        checkPlace(id, held, peer);
        const record = rescuedRecord(keys, checked, permanent, held, count);
        made = record.header;
        return record;
      };
      await registry.restore(id, actor, audited, change, 'rescue');
      log.warn(
        { vtpm: id, from: peer.name, method: statement.method },
        'a vTPM was rescued from a host that is dead; should that host still run it, there are two of it',
      );
      onHeld();
      return planOf(checked, made);
    } catch (caught) {
      const reason = ManagerError.from(caught);
      const verdict = statusOf(reason) < 500 ? 'refused' : 'failed';
      const { code, message } = reason;
      reason.isAudited = true;
      await audit.append({ ...event, verdict, reason: { code, message } });
      throw reason;
    }
  }

  checkFenced(pending: PendingDeparture, fencing: SignedFencing): void {
    checkDestinationFenced(fencing, pending, this.parts.trust);
  }

  async takeBack(actor: AuditActor, pending: PendingDeparture, fencing: SignedFencing): Promise<void> {
    await takeBack(this.parts, actor, pending, checkDestinationFenced(fencing, pending, this.parts.trust));
  }

  async held(hostId: Uint8Array): Promise<readonly SignedRescue[]> {
    const all = await this.parts.registry.rescues.held();
    return all.filter((rescue) => bytesEqual(parseNotice(rescue).source, hostId));
  }

  async heard(hostId: Uint8Array, vtpmUuid: Uint8Array): Promise<void> {
    const isTheirs = (rescue: SignedRescue): boolean => bytesEqual(parseNotice(rescue).source, hostId);
    await this.parts.registry.rescues.heard(uuidToText(vtpmUuid), isTheirs);
  }

  async take(hostId: Uint8Array, rescues: readonly SignedRescue[]): Promise<Uint8Array[]> {
    const heard: Uint8Array[] = [];
    let refusal: ManagerError | undefined;
    for (const signed of rescues) {
      try {
        const uuid = await this.#takeOne(hostId, signed);
        if (uuid) heard.push(uuid);
      } catch (caught) {
        // One that is bad hides none that is good; the first speaks for all of a message.
        refusal ??= ManagerError.from(caught);
      }
    }
    if (refusal) {
      const rescuer = hex(hostId);
      await this.parts.registry.rescues.noteRefusal(rescuer, refusal);
      this.parts.log.warn({ rescuer, reason: refusal.code }, refusal.message);
    }
    return heard;
  }

  /** @returns its uuid where nobody runs it here any more */
  async #takeOne(rescuer: Uint8Array, signed: SignedRescue): Promise<Uint8Array | undefined> {
    const { keys, registry, log, trust } = this.parts;
    const parties = { hostId: keys.hostKey.publicKey, backupKey: keys.backupKey.publicKey, rescuer };
    const notice = verifiedNotice(signed, parties);
    const { departure } = notice;
    const id = uuidToText(notice.vtpmUuid);
    const peer = trust.peerById(rescuer);
    if (!peer) throw unknownPeer(hex(rescuer));
    const by = peer.name;
    const facts = { rescuer: hex(rescuer), by, at: new Date(Number(notice.at)).toISOString() };
    // The last epoch that was not the rescuer's, as where a vTPM leaves by itself.
    const epoch = notice.epoch - 1n;
    let isEnded = false;
    const to: GoneTo = { destination: rescuer, epoch, sentBy: departure?.migrationId };
    if (departure) await registry.arrivals.giveUp({ ...departure, source: rescuer });
    const end = await registry.rescues.giveUp(id, to, facts, (record, now) => {
      // It has come back since.
      if (record.header.epoch > epoch) return undefined;
      if (!cameFrom(record.header, to)) {
        throw new ManagerError(
          'bad-request',
          `host ${by} says that it took vTPM ${id} back, which is not here from there`,
        );
      }
      this.#checkMayEnd(id, peer);
      isEnded = true;
      const { generation } = notice;
      const where = { destination: rescuer, epoch, migrationId: NO_MIGRATION, mode: 'OFFLINE' } as const;
      return movedAway(record, { ...where, at: now, generation }, now);
    });
    if (isEnded) {
      log.warn(
        { vtpm: id, by },
        'this vTPM was rescued by another host while this one was away; it lives there now',
      );
    }
    if (end === 'in-doubt') {
      log.warn(
        { vtpm: id, by },
        'this vTPM was rescued by another host, and is on its way to a third one; settle that first: vtpmctl migrate resolve',
      );
    }
    if (end === 'unknown') {
      log.warn(
        { vtpm: id, by },
        'this vTPM was rescued by another host; it is not in the store here, but that is an old one which was accepted: should the ' +
          'newest come back, that host says so again',
      );
    }
    if (end === 'elsewhere') {
      log.error(
        { vtpm: id, by },
        'this vTPM was rescued by another host, but had gone from here to a third one before: both may run it now; ' +
          'stop it on one of the two and retire it there (the audit log names both)',
      );
    }
    return end === 'over' ? notice.vtpmUuid : undefined;
  }

  /** Its state would be gone here: no host may say so to which the operator lets nothing go. */
  #checkMayEnd(id: string, peer: Peer): void {
    try {
      checkRight(peer, 'receive');
    } catch (error) {
      this.parts.log.error(
        { vtpm: id, by: peer.name },
        'a host that vTPMs do not go to says that it rescued this one: if that is so, both run it now; ' +
          `stop it there, or have it end here: vtpmctl peer change ${peer.name} --receive`,
      );
      throw error;
    }
  }
}

function planOf(
  { facts, statement, peer }: CheckedRescue,
  made: Pick<RecordHeader, 'generation' | 'epoch'> | undefined,
): RescuePlan {
  return {
    id: uuidToText(facts.vtpmUuid),
    vmUuid: uuidToText(facts.vmUuid),
    from: peer.name,
    generation: facts.generation,
    lastGeneration: statement.lastGeneration,
    savedAt: facts.savedAt,
    next: made?.generation,
    epoch: made?.epoch,
  };
}

function hex(bytes: Uint8Array): string {
  return Buffer.from(bytes).toString('hex');
}
