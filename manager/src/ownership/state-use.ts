import { bytesEqual, type SaveBody, type StateAction, type StateUse, type Verb } from 'vtpm-proto';
import type { AuditAction } from '../audit/index.js';
import { ManagerError } from '../error.js';
import type { VtpmRecord } from '../records/index.js';

/** A worker may say what its VMM did so often at once, then one time in five seconds: each time is written down. */
export const USE_RATE = { burst: 32, perSecond: 0.2 } as const;

const DIGEST_BYTES = 32;

/** What an action needs. `ends`: it is about the suspended state that there is. */
interface Rule {
  readonly audits: AuditAction;
  readonly verb?: Verb;
  readonly ends?: boolean;
  /** The TPM counts it before it takes effect. */
  readonly isCounted?: boolean;
}

const RULES: Readonly<Record<StateAction, Rule>> = {
  SUSPEND: { audits: 'suspend' },
  RESTORE: { audits: 'resume', ends: true },
  TAKE_BACK: { audits: 'take-back', ends: true },
  DROP: { audits: 'drop', ends: true },
  EXPORT: { audits: 'export', verb: 'EXPORT', isCounted: true },
  IMPORT: { audits: 'import', verb: 'IMPORT', isCounted: true },
};

/** Of a ticket's verbs, those that a session needs after its Load. */
export function verbsOfSaves(verbs: readonly Verb[]): Verb[] {
  return verbs.filter((verb) => Object.values(RULES).some((rule) => rule.verb === verb));
}

/**
 * Whether a save may say that of the state.
 * @throws ManagerError `verb-missing`; `bad-request` where its parts do not fit, or nothing is suspended
 */
export function checkUse({ use, permanent, volatile }: SaveBody, { header }: VtpmRecord): void {
  if ((use?.action === 'SUSPEND') !== (volatile !== undefined)) {
    throw new ManagerError(
      'bad-request',
      'volatile state is saved where the TPM is suspended, and only there',
    );
  }
  if (!use) return;
  const { audits, verb, ends } = RULES[use.action];
  if (verb && !header.session?.verbs.includes(verb)) {
    throw new ManagerError(
      'verb-missing',
      `the ticket has not the verb ${audits}: the state of this vTPM does not go out or come in in the clear; ` +
        'create it with --state-blobs plain',
    );
  }
  if (use.digest.length !== DIGEST_BYTES) {
    throw new ManagerError(
      'bad-request',
      `what a save says of the state has a digest of ${use.digest.length} bytes`,
    );
  }
  if (!permanent)
    throw new ManagerError('bad-request', 'a save that is about the state brings no permanent part');
  if (ends && !(header.suspension && bytesEqual(header.suspension.referenceDigest, use.digest))) {
    throw new ManagerError('bad-request', 'the save is about another suspended state than there is');
  }
}

/** Under which name the audit log has it. */
export function actionOf({ action }: StateUse): AuditAction {
  return RULES[action].audits;
}

/** Whether the TPM counts a save before it is acknowledged: the marks it makes are for ever. */
export function isCounted(use: StateUse | undefined): boolean {
  return use !== undefined && RULES[use.action].isCounted === true;
}

/**
 * What the audit log says of a save, undefined where nothing. A save that does not mention a suspended state takes it back:
 * the TPM went on. Of one that goes on as it came from another host, the migration is in the log: its guest waits.
 */
export function auditedUse(
  use: StateUse | undefined,
  before: VtpmRecord,
): { readonly action: AuditAction; readonly facts: Readonly<Record<string, string>> } | undefined {
  const { suspension } = before.header;
  if (!use && !suspension) return undefined;
  if (use?.action === 'RESTORE' && isAsItCame(before)) return undefined;
  const { action, digest } = use ?? {
    action: 'TAKE_BACK',
    digest: suspension?.referenceDigest ?? new Uint8Array(0),
  };
  return { action: RULES[action].audits, facts: { digest: Buffer.from(digest).toString('hex') } };
}

/** Its worker waited for the migration that brought it, and has saved nothing since. */
function isAsItCame({ header: { epoch, generation, lineage } }: VtpmRecord): boolean {
  const came = lineage.at(-1);
  return came?.lastEpoch === epoch - 1n && came.lastGeneration === generation;
}
