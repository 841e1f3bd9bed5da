import { createHash, createPublicKey } from 'node:crypto';
import {
  type Approval,
  type ApprovalRequest,
  authorityPem,
  type PcrValues,
  readApprovalRequest,
  signApproval,
  TpmError,
} from 'tpm2-ts-bindings';
import { ToolstackError } from '../../error.js';
import type { Context } from '../context.js';
import { readGivenFile, readJsonFile, readOwnerAuth, readPrivateKey } from '../given-files.js';
import { fields, table, time } from '../output.js';
import type { ApprovalOutcome, ListedApproval, PlatformView } from '../platform-api.js';

const STATES: Readonly<Record<ListedApproval['state'], string>> = {
  active: 'active: good for the PCR values of now',
  ready: 'ready: good when the PCRs have these values',
  revoked: 'revoked',
  early: 'early: counts after the next revocation',
  other: 'of another authority or PCR selection',
};

export interface KeyFlags {
  readonly key?: string;
  readonly passphraseFile?: string;
  readonly scheme?: 'rsassa' | 'rsapss';
}

export interface StateFlags {
  readonly set?: readonly string[];
  readonly label?: string;
  readonly next?: boolean;
  readonly pcrs?: string;
}

export interface OwnerFlags {
  readonly ownerAuthFile?: string;
}

export async function showPlatform({ manager, output }: Context): Promise<void> {
  const view = await manager.platform.view();
  output.result(view, describe(view));
}

function describe(view: PlatformView): string {
  const wanted = view.policy === 'fixed' ? view.enrolledPcrs : undefined;
  const pcrs = Object.entries(view.pcrs).map(([name, value]) => {
    const enrolled = wanted?.[name];
    const differs = enrolled !== undefined && enrolled !== value ? `  (enrolled with ${enrolled})` : '';
    return [`PCR ${name}`, `${value}${differs}`] as const;
  });
  const { approvals, erasure, lockedBecause } = view;
  const count = (state: ListedApproval['state']) => approvals.filter((one) => one.state === state).length;
  return fields([
    [
      'policy',
      view.policy === 'fixed' ? 'fixed: the PCR values of enrolment' : 'what the authority approved',
    ],
    ['authority', view.authority === null ? null : fingerprint(view.authority)],
    ['PCRs', view.pcrSelection],
    ...pcrs,
    ['approved now', view.isApproved ? 'yes' : 'no'],
    [
      'approvals',
      view.policy === 'fixed'
        ? null
        : `${count('active')} active, ${count('ready')} ready, ${count('revoked')} revoked, ${count('early')} early`,
    ],
    ['revocations', `counter at ${view.counter}`],
    ['generation', `${view.generation} of the root key${view.isRotating ? ', being rotated' : ''}`],
    [
      'erasure',
      erasure &&
        `what was deleted since ${time(erasure.since)} opens on old disks until a rotation: ` +
          (erasure.due === null
            ? 'vtpmctl platform rotate'
            : `by itself after ${time(erasure.due)}, or vtpmctl platform rotate`),
    ],
    ['locked', lockedBecause && `${lockedBecause.message} (${lockedBecause.code})`],
  ]);
}

/** SHA-256 of the public key, to be compared by people. */
export function fingerprint(pem: string): string {
  const der = createPublicKey(pem).export({ type: 'spki', format: 'der' });
  return `SHA-256 ${createHash('sha256').update(der).digest('hex')}`;
}

export async function listApprovals({ manager, output }: Context): Promise<void> {
  const { approvals, counter, policy } = await manager.platform.view();
  const rows = approvals.map(({ label, createdAt, counter: of, pcrs, state }) => [
    label,
    time(createdAt),
    of,
    briefly(pcrs),
    STATES[state],
  ]);
  output.result(
    { policy, counter, approvals },
    rows.length === 0
      ? 'no approvals; make one with: vtpmctl platform approve --key FILE --label LABEL'
      : table(['LABEL', 'MADE', 'COUNTER', 'PCRS', 'STATE'], rows),
  );
}

function briefly(pcrs: PcrValues): string {
  return Object.entries(pcrs)
    .map(([name, value]) => `${name}=${value.slice(0, 16)}…`)
    .join(' ');
}

/** Prints what the authority is to sign; with and without --json the same, as it goes into a file. */
export async function predict(flags: StateFlags, { manager, output }: Context): Promise<void> {
  const request = await askFor(flags, manager);
  output.result(request, JSON.stringify(request, null, 2));
  output.note(`to be signed where the authority's key is: vtpmctl platform sign --key FILE REQUEST`);
}

async function askFor(flags: StateFlags, manager: Context['manager']): Promise<ApprovalRequest> {
  if (flags.label === undefined || flags.label === '') {
    throw new ToolstackError(
      'usage',
      '--label is missing: a name for this state, for who reads the list later',
    );
  }
  const pcrs = await valuesOf(flags, manager);
  return await manager.platform.request({
    label: flags.label,
    pcrs,
    next: flags.next === true,
    pcrSelection: flags.pcrs,
  });
}

/** `7=HEX` or `sha256:7=HEX`. */
async function valuesOf({ set = [], pcrs }: StateFlags, manager: Context['manager']): Promise<PcrValues> {
  if (set.length === 0) return {};
  const selection = pcrs ?? (await manager.platform.view()).pcrSelection;
  const values: Record<string, string> = {};
  for (const text of set) {
    const match = /^(?:([a-z0-9]+):)?(\d{1,2})=([0-9a-f]+)$/i.exec(text);
    if (!match?.[2] || !match[3]) {
      throw new ToolstackError('usage', `--set is PCR=HEX, such as 7=0123…, not "${text}"`);
    }
    // A selection may have several banks; the first is meant where none is named.
    const bank = match[1] ?? selection.split(':')[0] ?? 'sha256';
    values[`${bank}:${Number(match[2])}`] = match[3].toLowerCase();
  }
  return values;
}

/** Needs neither a daemon nor a TPM: the authority's key is on another machine. */
export async function sign(requestFile: string, flags: KeyFlags, { output }: Context): Promise<void> {
  const key = keyOf(flags);
  const request = asUsage(() => readApprovalRequest(readJsonFile('the request', requestFile)));
  const approval = signed(request, key, flags);
  output.note(
    fields([
      ['signed', request.label],
      ['installation', request.subject],
      ['counter', request.counter],
      ...Object.entries(request.pcrs).map(([name, value]) => [`PCR ${name}`, value] as const),
    ]),
  );
  output.result(approval, JSON.stringify(approval, null, 2));
}

function signed(request: ApprovalRequest, key: string, { scheme }: KeyFlags): Approval {
  return asUsage(() => signApproval(request, key, scheme === undefined ? {} : { scheme }));
}

function keyOf({ key, passphraseFile }: KeyFlags): string {
  if (key === undefined) throw new ToolstackError('usage', "--key is missing: the authority's private key");
  return readPrivateKey(key, passphraseFile);
}

/** What the operator gave is to blame. */
function asUsage<T>(body: () => T): T {
  try {
    return body();
  } catch (error) {
    if (!(error instanceof TpmError)) throw error;
    throw new ToolstackError('usage', error.message, { cause: error });
  }
}

/** One that was signed elsewhere, or one that is asked for, signed and given in one go. */
export async function approve(
  file: string | undefined,
  flags: KeyFlags & StateFlags,
  { manager, output }: Context,
): Promise<void> {
  if ((file === undefined) === (flags.key === undefined)) {
    throw new ToolstackError(
      'usage',
      'name a signed approval, or sign one here: vtpmctl platform approve --key FILE --label LABEL',
    );
  }
  if (file !== undefined && (flags.set ?? flags.label ?? flags.next ?? flags.pcrs) !== undefined) {
    throw new ToolstackError(
      'usage',
      '--set, --label, --pcrs and --next go with --key: an approval says all of it',
    );
  }
  const approval =
    file === undefined
      ? signed(await askFor(flags, manager), keyOf(flags), flags)
      : readJsonFile('the approval', file);
  const outcome = await manager.platform.approve(approval);
  output.result(outcome, describeOutcome(outcome));
}

function describeOutcome({ approval, isUnlocked, lockedBecause }: ApprovalOutcome): string {
  const lines = [`approved "${approval.label}"; ${STATES[approval.state]}`];
  if (isUnlocked) lines.push('the manager is unlocked; workers that waited go on; next: vtpmctl up');
  if (lockedBecause) {
    lines.push(`the manager is still locked: ${lockedBecause.message} (${lockedBecause.code})`);
  }
  return lines.join('\n');
}

/** Every approval is signed anew for the next value of the counter but those named; then the counter is counted. */
export async function revoke(
  label: string | undefined,
  flags: KeyFlags & OwnerFlags & { readonly survivors?: readonly string[] },
  { manager, output }: Context,
): Promise<void> {
  const { survivors: files } = flags;
  if ((files === undefined) === (flags.key === undefined)) {
    throw new ToolstackError(
      'usage',
      'sign the survivors here with --key, or name them: --survivors FILE… (of vtpmctl platform predict --next)',
    );
  }
  if ((files === undefined) !== (label !== undefined)) {
    throw new ToolstackError(
      'usage',
      files === undefined
        ? 'name what is to be revoked: vtpmctl platform list shows the labels'
        : 'with --survivors everything else is revoked: it takes no label',
    );
  }
  const ownerAuth = readOwnerAuth(flags.ownerAuthFile);
  const survivors = files
    ? files.map((file) => readJsonFile('--survivors', file))
    : await resigned(label ?? '', flags, manager);
  const { counter, revoked } = await manager.platform.revoke(survivors, ownerAuth);
  output.result(
    { counter, revoked, survivors: survivors.length },
    fields([
      ['revoked', revoked.length === 0 ? 'nothing that was good' : revoked.join(', ')],
      ['survivors', survivors.length],
      ['counter', `now at ${counter}: what was approved before is dead, in old copies too`],
    ]),
  );
}

async function resigned(label: string, flags: KeyFlags, manager: Context['manager']): Promise<Approval[]> {
  const key = keyOf(flags);
  const { approvals } = await manager.platform.view();
  const good = approvals.filter(({ state }) => state === 'active' || state === 'ready');
  const kept = good.filter((approval) => approval.label !== label);
  if (kept.length === good.length) {
    const labels = good.map((approval) => `"${approval.label}"`).join(', ');
    throw new ToolstackError(
      'usage',
      `no approval that counts is called "${label}"; there ${good.length === 1 ? 'is' : 'are'} ${labels || 'none'}`,
    );
  }
  const survivors: Approval[] = [];
  for (const { label: name, pcrs, pcrSelection } of kept) {
    const request = await manager.platform.request({ label: name, pcrs, next: true, pcrSelection });
    survivors.push(signed(request, key, flags));
  }
  return survivors;
}

export interface AdoptFlags extends KeyFlags, OwnerFlags {
  readonly authority?: string;
  readonly none?: boolean;
  readonly approval?: readonly string[];
  readonly label?: string;
  readonly pcrs?: string;
}

/** Another authority, none, or other PCRs: a rotation, since each is another policy of the root key. */
export async function adopt(flags: AdoptFlags, { manager, output }: Context): Promise<void> {
  const { authority: file, none, approval: files = [], label, pcrs } = flags;
  if (file !== undefined && none)
    throw new ToolstackError('usage', '--authority and --none exclude each other');
  if (file === undefined && !none && pcrs === undefined) {
    throw new ToolstackError('usage', 'say what to adopt: --authority FILE, --none or --pcrs SELECTION');
  }
  if ((flags.key === undefined) !== (label === undefined)) {
    throw new ToolstackError('usage', '--key and --label go together: they approve the PCR values of now');
  }
  const ownerAuth = readOwnerAuth(flags.ownerAuthFile);
  const authority =
    file === undefined ? undefined : asUsage(() => authorityPem(readGivenFile('--authority', file)));
  const approvals = files.map((one) => readJsonFile('--approval', one));
  if (label !== undefined) {
    approvals.push(
      signed(await askFor({ label, ...(pcrs !== undefined && { pcrs }) }, manager), keyOf(flags), flags),
    );
  }
  for (const approval of approvals) await manager.platform.approve(approval, authority);
  const change = { authority: none ? null : authority, pcrSelection: pcrs };
  const policy = await manager.platform.change(change, ownerAuth);
  output.result(
    policy,
    policy.policy === 'fixed'
      ? `the root key is released while ${policy.pcrSelection} is as now (generation ${policy.generation}); what was sealed before is worthless`
      : `the root key is released for what the authority approves of ${policy.pcrSelection} (generation ${policy.generation}); what was sealed before is worthless`,
  );
}

export async function rotate(flags: OwnerFlags, { manager, output }: Context): Promise<void> {
  const policy = await manager.platform.rotate(readOwnerAuth(flags.ownerAuthFile));
  output.result(
    policy,
    `the root key has generation ${policy.generation}; disks from before, and what was deleted, do not open any more`,
  );
}
