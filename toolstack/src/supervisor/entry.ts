import { ToolstackError } from '../error.js';
import { DEFAULT_DOORS, DOOR_KINDS, type DoorKind, parseDoors } from './door-kinds.js';

export type Isolation = 'sandbox' | 'vm' | 'none';
/** What the worker does before its doors open: TPM2_Startup(CLEAR), or nothing because the firmware sends it. */
export type Startup = 'clear' | 'none';

/** What its VMM takes out: a reference that works once, here; or the whole state, in the clear. */
export type StateBlobs = 'reference' | 'plain';

/** Who starts a vTPM through the drop-in commands: whoever has the token of that place and is that user. */
export interface DropinBinding {
  /** Of the token's secret, hex: the secret itself is nowhere but in the token. */
  readonly secretSha256: string;
  readonly uid: number;
  /** Absolute path of the directory or file that the token is in; a copy elsewhere is not a second TPM. */
  readonly place: string;
}

/** A migration of which it is not known here yet what came of it: only the manager knows then who may run the vTPM. */
export interface EntryMigration {
  /** 32 hex digits, as its order has it. */
  readonly id: string;
  readonly role: 'departing' | 'arriving';
  /** Name of the other host, as this one knows it. */
  readonly peer: string;
  /** The entry was made for it, and goes again where it is aborted. */
  readonly isNew: boolean;
}

/** Where a vTPM of this host went. */
export interface Moved {
  readonly to: string;
  /** ISO 8601. */
  readonly at: string;
}

/** What the supervisor keeps of one vTPM. It is JSON on disk. */
export interface Entry {
  /** UUID. */
  readonly id: string;
  /** For operators and as the directory of the doors. */
  readonly name: string;
  readonly vmUuid: string;
  readonly isolation: Isolation;
  /** Started with the supervisor. */
  readonly autostart: boolean;
  readonly startup: Startup;
  /** Which doors it has, at least one. */
  readonly doors: readonly DoorKind[];
  /** For good: the delegation grants it, or does not. */
  readonly stateBlobs: StateBlobs;
  /** Whom its doors belong to, `uid:gid` in numbers; null: to the supervisor's user. */
  readonly socketOwner: string | null;
  /** Permission bits of its doors, `0600` or `0660`. */
  readonly socketMode: string;
  /** Null: it is started by `vtpmctl start` or with the supervisor. */
  readonly dropin: DropinBinding | null;
  readonly migration: EntryMigration | null;
  /** Serialised Delegation to this supervisor's key, base64. */
  readonly delegation: string;
  /** Ed25519 of the toolstack key over it, base64. */
  readonly delegationSignature: string;
  /** Set for good once a generation ≥ 1 was seen: no ticket carries MANUFACTURE any more. */
  readonly manufactured: boolean;
  /** The newest power-on of the VM, a UUID. */
  readonly vmRunId: string | null;
  /** The newest epoch that a worker served. */
  readonly epoch: number | null;
  /** The host's boot during which it was last started and not stopped since, hex. */
  readonly runningInBoot: string | null;
  /** Why the last worker ended without being asked to. */
  readonly crashed: string | null;
  /** Null: it lives here. It may come back. */
  readonly moved: Moved | null;
  /** A worker without a checkpoint has lost its PCRs: only a new VM run may follow, so nothing restarts it. */
  readonly restart: 'never';
}

/** What the caller of `create` says. */
export type NewEntry = Pick<
  Entry,
  | 'id'
  | 'name'
  | 'vmUuid'
  | 'isolation'
  | 'autostart'
  | 'startup'
  | 'doors'
  | 'stateBlobs'
  | 'socketOwner'
  | 'socketMode'
  | 'dropin'
  | 'migration'
  | 'delegation'
  | 'delegationSignature'
>;

/** Of format 1: the doors are for the supervisor's user alone. */
const PRIVATE_DOORS = { socketOwner: null, socketMode: '0600' };
/** What each format of the list added, and what a list that does not know it means. */
const ADDED: Readonly<Record<number, Partial<Entry>>> = {
  2: PRIVATE_DOORS,
  3: { doors: DEFAULT_DOORS, stateBlobs: 'reference', dropin: null },
  4: { migration: null, moved: null },
};
/** Format number of a list of entries. */
export const ENTRY_FORMAT = 4;
/** What a caller who does not say it means. */
const DEFAULTS: Partial<Entry> = {
  ...PRIVATE_DOORS,
  doors: DEFAULT_DOORS,
  stateBlobs: 'reference',
  dropin: null,
  migration: null,
};

const UUID = /^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$/;
export function isUuid(text: string): boolean {
  return UUID.test(text);
}

/** A file name in any directory, never `.` or `..`, and never taken for an option. */
const NAME = /^[a-z0-9][a-z0-9._-]{0,62}$/;
const BASE64 = /^(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$/;
const BOOT = /^[0-9a-f]{32}$/;
const MIGRATION = /^[0-9a-f]{32}$/;
const OWNER = /^\d{1,10}:\d{1,10}$/;

type Check = readonly [(value: unknown) => boolean, string];
const text = (pattern: RegExp, what: string): Check => [
  (value) => typeof value === 'string' && value.length <= 8192 && pattern.test(value),
  what,
];
const oneOf = (...values: readonly unknown[]): Check => [
  (value) => values.includes(value),
  `one of ${values.join(', ')}`,
];
const orNull = ([check, what]: Check): Check => [
  (value) => value === null || check(value),
  `${what} or null`,
];
const flag: Check = [(value) => typeof value === 'boolean', 'true or false'];

const NEW_ENTRY: Readonly<Record<keyof NewEntry, Check>> = {
  id: text(UUID, 'a UUID in lower case'),
  name: text(NAME, '1 to 63 of a-z 0-9 . _ - and begins with a letter or digit'),
  vmUuid: text(UUID, 'a UUID in lower case'),
  isolation: oneOf('sandbox', 'vm', 'none'),
  autostart: flag,
  startup: oneOf('clear', 'none'),
  doors: [
    (value) => parseDoors(value) !== undefined,
    `a list of at least one of ${DOOR_KINDS.join(', ')}, none twice`,
  ],
  stateBlobs: oneOf('reference', 'plain'),
  socketOwner: orNull(text(OWNER, 'uid:gid in numbers')),
  socketMode: oneOf('0600', '0660'),
  dropin: orNull([isBinding, 'the secretSha256, uid and place of a token']),
  migration: orNull([isMigration, 'the id, role and peer of a migration, and whether the entry is new']),
  delegation: text(BASE64, 'base64'),
  delegationSignature: text(BASE64, 'base64'),
};

const ENTRY: Readonly<Record<keyof Entry, Check>> = {
  ...NEW_ENTRY,
  manufactured: flag,
  vmRunId: orNull(text(UUID, 'a UUID')),
  epoch: orNull([(value) => Number.isSafeInteger(value) && Number(value) >= 0, 'a whole number']),
  runningInBoot: orNull(text(BOOT, '32 hex digits')),
  crashed: orNull([(value) => typeof value === 'string', 'text']),
  moved: orNull([isMoved, 'where it went and when']),
  restart: oneOf('never'),
};

/** @throws ToolstackError `bad-request` that names the field */
export function parseNewEntry(value: unknown): NewEntry {
  const given = typeof value === 'object' && !Array.isArray(value) ? { ...DEFAULTS, ...value } : value;
  return check(given, NEW_ENTRY) as unknown as NewEntry;
}

/** Some fields of a new entry, and no others. @throws ToolstackError `bad-request` that names the field */
export function parseNewEntryFields<K extends keyof NewEntry>(
  value: unknown,
  names: readonly K[],
): Pick<NewEntry, K> {
  return check(value, Object.fromEntries(names.map((name) => [name, NEW_ENTRY[name]]))) as Pick<NewEntry, K>;
}

/** What can be changed while it is stopped. */
export type EntryChange = Partial<Pick<Entry, 'doors' | 'startup' | 'dropin'>>;

/** @throws ToolstackError `bad-request` that names the field, or where nothing would change */
export function parseEntryChange(value: unknown): EntryChange {
  const given = Object.keys(typeof value === 'object' && value !== null ? value : {});
  const fields = Object.entries({ doors: ENTRY.doors, startup: ENTRY.startup, dropin: ENTRY.dropin }).filter(
    ([name]) => given.includes(name),
  );
  const change = check(value, Object.fromEntries(fields)) as EntryChange;
  if (fields.length === 0) throw new ToolstackError('bad-request', 'nothing is named that is to be changed');
  return change;
}

/**
 * @param format of the list that it stands in
 * @throws ToolstackError `bad-request` that names the field
 */
export function parseEntry(value: unknown, format = ENTRY_FORMAT): Entry {
  const later = Object.entries(ADDED).filter(([added]) => Number(added) > format);
  const defaults = Object.assign({}, ...later.map(([, fields]) => fields)) as Partial<Entry>;
  const known = Object.entries(ENTRY).filter(([name]) => !Object.hasOwn(defaults, name));
  return { ...check(value, Object.fromEntries(known)), ...defaults } as unknown as Entry;
}

export function newEntry(given: NewEntry): Entry {
  return {
    ...given,
    // What arrives has its TPM, and none is ever made in its place.
    manufactured: given.migration !== null,
    vmRunId: null,
    epoch: null,
    runningInBoot: null,
    crashed: null,
    moved: null,
    restart: 'never',
  };
}

function isBinding(value: unknown): boolean {
  if (typeof value !== 'object' || value === null) return false;
  const { secretSha256, uid, place, ...rest } = value as Record<string, unknown>;
  return (
    typeof secretSha256 === 'string' &&
    /^[0-9a-f]{64}$/.test(secretSha256) &&
    isUid(uid) &&
    typeof place === 'string' &&
    /^\/[^\0]{0,4095}$/.test(place) &&
    Object.keys(rest).length === 0
  );
}

function isMigration(value: unknown): boolean {
  if (typeof value !== 'object' || value === null) return false;
  const { id, role, peer, isNew, ...rest } = value as Record<string, unknown>;
  return (
    typeof id === 'string' &&
    MIGRATION.test(id) &&
    (role === 'departing' || role === 'arriving') &&
    isName(peer) &&
    typeof isNew === 'boolean' &&
    Object.keys(rest).length === 0
  );
}

function isMoved(value: unknown): boolean {
  if (typeof value !== 'object' || value === null) return false;
  const { to, at, ...rest } = value as Record<string, unknown>;
  return (
    isName(to) && typeof at === 'string' && Number.isFinite(Date.parse(at)) && Object.keys(rest).length === 0
  );
}

function isName(value: unknown): boolean {
  return typeof value === 'string' && value.length > 0 && value.length <= 256;
}

function isUid(value: unknown): boolean {
  return Number.isSafeInteger(value) && Number(value) >= 0 && Number(value) < 0xffff_ffff;
}

/** Exactly the known fields: one that is not known may be the one that matters. */
function check(value: unknown, fields: Readonly<Record<string, Check>>): Record<string, unknown> {
  if (typeof value !== 'object' || value === null || Array.isArray(value)) {
    throw new ToolstackError('bad-request', 'a vTPM is a JSON object');
  }
  const given = value as Record<string, unknown>;
  const out: Record<string, unknown> = {};
  for (const [key, [accepts, what]] of Object.entries(fields)) {
    if (!Object.hasOwn(given, key)) throw new ToolstackError('bad-request', `"${key}" is missing`);
    if (!accepts(given[key])) throw new ToolstackError('bad-request', `"${key}" must be ${what}`);
    out[key] = given[key];
  }
  for (const key of Object.keys(given)) {
    if (!Object.hasOwn(fields, key)) throw new ToolstackError('bad-request', `"${key}" is not known`);
  }
  return out;
}
