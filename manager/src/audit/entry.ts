import { ManagerError } from '../error.js';

/** Everything the audit log can say was done. */
export const AUDIT_ACTIONS = [
  // The manager's own life
  'init',
  'start',
  'stop',
  'locked',
  'unclean',
  'uninstall',
  // vTPMs
  'load',
  'fence',
  'freeze',
  'thaw',
  'retire',
  'import',
  'export',
  // A TPM that is taken out as a reference, and what becomes of it
  'suspend',
  'resume',
  'take-back',
  'drop',
  // Migration
  'migrate-out',
  'migrate-in',
  'migrate-commit',
  'migrate-abort',
  'migrate-resolve',
  'rescue',
  // Trust configuration
  'image-allow',
  'image-remove',
  'toolstack-add',
  'toolstack-remove',
  'peer-identity',
  'peer-add',
  'peer-change',
  'peer-remove',
  'peer-connect',
  // Platform policy and keys
  'platform-approve',
  'platform-revoke',
  'platform-rotate',
  'platform-authority',
  'recover',
  'accept-rollback',
  // Copies
  'backup',
  'restore',
  'audit-export',
] as const;
export type AuditAction = (typeof AUDIT_ACTIONS)[number];

/** `intended` is written before what cannot be undone, `done` or `failed` after it; `refused`: nothing was done. */
export const AUDIT_VERDICTS = ['done', 'refused', 'intended', 'failed'] as const;
export type AuditVerdict = (typeof AUDIT_VERDICTS)[number];

/** Who asked for it. */
export type AuditActor =
  | 'manager'
  /** Of the caller on the admin socket. */
  | { readonly uid: number }
  /** The beginning of its key in hex, or the pid and uid of its socket. */
  | { readonly worker: string }
  /** Hex of 32 bytes. */
  | { readonly toolstackKey: string };

/**
 * What is to be written down. No secret belongs in it. Text may come from outside: what is longer than its bound is cut
 * and ends with an ellipsis.
 */
export interface AuditEvent {
  readonly actor: AuditActor;
  readonly action: AuditAction;
  readonly verdict: AuditVerdict;
  /** UUID, in lower case. */
  readonly vtpm?: string;
  readonly epoch?: bigint;
  readonly generation?: bigint;
  /** An error code and its sentence, or the operator's words. */
  readonly reason?: { readonly code: string; readonly message: string };
  /** At most 16; names as in code. */
  readonly facts?: Readonly<Record<string, string>>;
}

/** An entry as it was read. The action is text: a newer version may know more of them. */
export interface AuditEntry extends Omit<AuditEvent, 'action'> {
  /** From 1. */
  readonly n: bigint;
  /** ISO 8601, UTC. */
  readonly time: string;
  readonly action: string;
}

export const MAX_FACTS = 16;
export const MAX_TEXT = { actor: 64, code: 64, message: 1000, fact: 256 } as const;
const FACT_NAME = /^[a-z][A-Za-z0-9-]{0,39}$/;
const UUID = /^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/;
const MAX_U64 = 2n ** 64n - 1n;

/**
 * The event's members as JSON text without braces, printable ASCII only: no text in it can end a line, and none can
 * steer a terminal that shows it.
 * @throws ManagerError `bad-request` for what only a mistake in the program can bring: bounded text never fails
 */
export function eventMembers(event: AuditEvent, time: Date): string {
  const { vtpm, epoch, generation, reason, facts } = event;
  if (vtpm !== undefined && !UUID.test(vtpm)) throw unfit('its vTPM is no UUID');
  return members({
    time: time.toISOString(),
    actor: boundActor(event.actor),
    action: event.action,
    vtpm,
    epoch: number('epoch', epoch),
    generation: number('generation', generation),
    verdict: event.verdict,
    reason: reason && {
      code: boundText(reason.code, MAX_TEXT.code),
      message: boundText(reason.message, MAX_TEXT.message),
    },
    facts: facts && boundFacts(facts),
  });
}

/** JSON text of an object's members, without its braces, in printable ASCII. */
export function members(object: object): string {
  return JSON.stringify(object)
    .slice(1, -1)
    .replace(/[^ -~]/g, (unit) => `\\u${unit.charCodeAt(0).toString(16).padStart(4, '0')}`);
}

/** @returns undefined where an object is no entry; that it is genuine is for the chain to say */
export function entryOf(n: bigint, object: Readonly<Record<string, unknown>>): AuditEntry | undefined {
  const { time, actor, action, vtpm, epoch, generation, verdict, reason, facts } = object;
  const isWhole =
    typeof time === 'string' &&
    typeof action === 'string' &&
    (actor === 'manager' || isObject(actor)) &&
    AUDIT_VERDICTS.some((known) => known === verdict) &&
    (vtpm === undefined || typeof vtpm === 'string') &&
    [epoch, generation].every((value) => value === undefined || isDecimal(value)) &&
    [reason, facts].every((value) => value === undefined || isObject(value));
  if (!isWhole) return undefined;
  return {
    n,
    time,
    actor: actor as AuditActor,
    action,
    verdict: verdict as AuditVerdict,
    ...(vtpm !== undefined && { vtpm }),
    ...(epoch !== undefined && { epoch: BigInt(epoch as string) }),
    ...(generation !== undefined && { generation: BigInt(generation as string) }),
    ...(reason !== undefined && { reason: reason as NonNullable<AuditEvent['reason']> }),
    ...(facts !== undefined && { facts: facts as NonNullable<AuditEvent['facts']> }),
  };
}

function boundActor(actor: AuditActor): AuditActor {
  if (actor === 'manager') return actor;
  if ('uid' in actor) return { uid: actor.uid };
  if ('worker' in actor) return { worker: boundText(actor.worker, MAX_TEXT.actor) };
  return { toolstackKey: boundText(actor.toolstackKey, MAX_TEXT.actor) };
}

function boundFacts(facts: Readonly<Record<string, string>>): Record<string, string> {
  const all = Object.entries(facts);
  if (all.length > MAX_FACTS) throw unfit(`it has more than ${MAX_FACTS} facts`);
  for (const [name] of all) {
    if (!FACT_NAME.test(name)) throw unfit('a fact has no name from the code');
  }
  return Object.fromEntries(all.map(([name, value]) => [name, boundText(value, MAX_TEXT.fact)]));
}

/** At most `limit` UTF-16 units. */
function boundText(text: string, limit: number): string {
  if (text.length <= limit) return text;
  // Half of a surrogate pair would be left at the end.
  return `${text.slice(0, limit - 1).replace(/[\ud800-\udbff]$/, '')}…`;
}

/** u64 in decimal: a number of JSON keeps 53 bits. */
function number(name: string, value: bigint | undefined): string | undefined {
  if (value === undefined) return undefined;
  if (value < 0n || value > MAX_U64) throw unfit(`its ${name} is no u64`);
  return value.toString();
}

function isDecimal(value: unknown): boolean {
  return typeof value === 'string' && /^\d{1,20}$/.test(value);
}

function isObject(value: unknown): value is object {
  return typeof value === 'object' && value !== null;
}

function unfit(why: string): ManagerError {
  return new ManagerError('bad-request', `this cannot be written into the audit log: ${why}`);
}
