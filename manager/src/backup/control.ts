import { randomBytes } from 'node:crypto';
import { existsSync, readFileSync } from 'node:fs';
import { barrier, type Paths } from 'vtpm-common';
import { type BackupFacts, type RecordHeader, type RestoreRequest, uuidToText } from 'vtpm-proto';
import { statusOf } from '../admin/http.js';
import type { AuditActor, AuditLog } from '../audit/index.js';
import { nextPath } from '../enrolment.js';
import { ManagerError } from '../error.js';
import type { KeyHierarchy } from '../keys/index.js';
import type { VtpmRegistry } from '../ownership/registry.js';
import { checkHere } from '../ownership/ticket-check.js';
import { restoredRecord, restoredTombstone, type VtpmRecord } from '../records/index.js';
import type { AnchoredStore } from '../store/index.js';
import { contentOf, parse, verifiedFacts } from './format.js';
import { writeBackup } from './write.js';

export interface BackupParts {
  readonly paths: Paths['manager'];
  readonly keys: KeyHierarchy;
  readonly store: AnchoredStore;
  readonly registry: VtpmRegistry;
  readonly audit: Pick<AuditLog, 'append'>;
}

/** What a restore of one vTPM does, or would do. */
export interface RestorePlan {
  readonly id: string;
  readonly action: 'restore' | 'retire' | 'nothing';
  /** Generation of the record in its place. */
  readonly from: bigint | undefined;
  /** Of the backup. */
  readonly to: bigint;
  /** On which it goes on, once it is done. */
  readonly next: bigint | undefined;
  readonly savedAt: bigint;
}

/** Makes backups and takes them back, while everything else goes on. */
export class BackupControl {
  constructor(private readonly parts: BackupParts) {}

  /**
   * The bytes of a backup. Nothing comes before it is in the audit log.
   * @param recipient X25519 public key, 32 bytes
   * @param ids of vTPMs; all unless given
   * @throws ManagerError `unknown-vtpm` before the first byte
   */
  async *backup(
    actor: AuditActor,
    recipient: Uint8Array,
    ids: readonly string[] | undefined,
  ): AsyncGenerator<Buffer, void> {
    const { registry, keys, store, audit, paths } = this.parts;
    // What is in it is never older than what the TPM has counted now.
    await store.count();
    const anchor = store.stated;
    const chosen = ids ? [...new Set(ids)].sort() : registry.list(undefined, Number.MAX_SAFE_INTEGER);
    for (const id of ids ? chosen : []) await registry.view(id);
    const backupId = randomBytes(16);
    const facts = {
      backup: backupId.toString('hex'),
      to: Buffer.from(recipient).toString('hex'),
      vtpms: String(chosen.length),
      of: ids ? 'named' : 'all',
    };
    const event = { actor, action: 'backup', facts } as const;
    await audit.append({ ...event, verdict: 'intended' });
    if (ids) for (const vtpm of chosen) await audit.append({ ...event, vtpm, verdict: 'intended' });
    barrier('backup.begun');
    let isWhole = false;
    try {
      // Where a rotation is under way, the generation that there will be.
      const enrolment = readFileSync(existsSync(nextPath(paths)) ? nextPath(paths) : paths.enrolment);
      const approvals = existsSync(paths.approvals) ? readFileSync(paths.approvals) : Buffer.alloc(0);
      yield* writeBackup({
        keys,
        recipient,
        anchor,
        enrolment,
        approvals,
        backupId,
        ids: chosen,
        record: (id) => registry.record(id),
      });
      isWhole = true;
    } catch (error) {
      if (error instanceof ManagerError) error.isAudited = true;
      throw error;
    } finally {
      await audit.append({ ...event, verdict: isWhole ? 'done' : 'failed' });
    }
    barrier('backup.done');
  }

  /** What a restore would do; changes nothing. @throws ManagerError that says why it would be refused */
  async plan(bytes: Uint8Array): Promise<RestorePlan> {
    const { facts } = this.#verified(bytes);
    const id = uuidToText(facts.vtpmUuid);
    const held = (await this.parts.registry.record(id))?.header;
    if (held && (await this.parts.registry.view(id)).isConnected) {
      throw new ManagerError('busy', `a worker is connected to vTPM ${id}; stop it first`);
    }
    const record = this.#change(facts, new Uint8Array(0), held, 0n);
    return { ...planOf(id, facts, held, record), next: undefined };
  }

  /**
   * Brings one vTPM back to the state of a backup that this installation made. The TPM has counted it when it resolves.
   * @throws ManagerError `wrong-manager`, `retired`, `moved`, `migrating`, `busy`, `bad-request`
   */
  async restore(actor: AuditActor, bytes: Uint8Array): Promise<RestorePlan> {
    const { facts, request } = this.#verified(bytes);
    const id = uuidToText(facts.vtpmUuid);
    const permanent = contentOf(facts, request);
    const audited = {
      backup: Buffer.from(request.headerDigest).toString('hex').slice(0, 32),
      to: String(facts.generation),
    };
    let plan: RestorePlan | undefined;
    try {
      await this.parts.registry.restore(id, actor, audited, (held, count) => {
        const record = this.#change(facts, permanent, held, count);
        plan = planOf(id, facts, held, record);
        return record;
      });
    } catch (caught) {
      const reason = ManagerError.from(caught);
      const verdict = statusOf(reason) < 500 ? 'refused' : 'failed';
      const { code, message } = reason;
      reason.isAudited = true;
      await this.parts.audit.append({
        actor,
        action: 'restore',
        vtpm: id,
        verdict,
        reason: { code, message },
        facts: audited,
      });
      throw reason;
    }
    if (!plan) throw new ManagerError('internal', 'a restore ended without a result');
    return plan;
  }

  #verified(bytes: Uint8Array): { readonly request: RestoreRequest; readonly facts: BackupFacts } {
    const request = parse('RestoreRequest', bytes, 'the request');
    try {
      const { publicKey } = this.parts.keys.backupKey;
      return { request, facts: verifiedFacts(publicKey, request.headerDigest, request) };
    } catch (cause) {
      throw new ManagerError(
        'wrong-manager',
        'this backup was not made by this installation, or was changed. It goes back to the installation that made it: ' +
          'where its disk is lost, vtpmctl rebuild makes it again from the backup',
        { cause },
      );
    }
  }

  /** @returns undefined where everything is as the backup says @throws ManagerError `retired`, `moved`, `migrating` */
  #change(
    facts: BackupFacts,
    permanent: Uint8Array,
    held: RecordHeader | undefined,
    count: bigint,
  ): VtpmRecord | undefined {
    const { keys } = this.parts;
    const id = uuidToText(facts.vtpmUuid);
    if (held?.kind === 'RETIRED' && facts.kind === 'RETIRED') return undefined;
    // Where it lives, or is to live, only its migrations say.
    if (held && facts.kind === 'MOVED') return undefined;
    if (held) checkHere(id, held);
    if (facts.kind === 'MOVED') return restoredTombstone(keys, facts);
    if (facts.kind === 'RETIRED') {
      if (!held) return restoredTombstone(keys, facts);
      throw new ManagerError(
        'retired',
        `the backup says that vTPM ${id} was retired, and it lives here: an old store was accepted since. ` +
          `Retire it again with vtpmctl delete ${id}`,
      );
    }
    if (facts.generation === 0n) return undefined;
    return restoredRecord(keys, facts, permanent, held, count);
  }
}

function planOf(
  id: string,
  facts: BackupFacts,
  held: RecordHeader | undefined,
  record: VtpmRecord | undefined,
): RestorePlan {
  return {
    id,
    action: !record ? 'nothing' : record.header.kind === 'LIVE' ? 'restore' : 'retire',
    from: held?.generation,
    to: facts.generation,
    next: record?.header.generation,
    savedAt: facts.savedAt,
  };
}
