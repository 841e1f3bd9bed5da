import type { AuditAction, AuditActor } from '../audit/index.js';
import { ManagerError } from '../error.js';
import { wipe } from '../keys/index.js';
import type { ApprovalOutcome, PlatformControl, PlatformView } from '../platform-control.js';
import { type Answer, bodyOf, ok, type Route } from './route.js';

/** Approvals are about 1 KiB each, and there may be many to survive. */
const MAX_BODY_BYTES = 1024 * 1024;
const MAX_SURVIVORS = 512;
const MAX_LABEL = 200;
const MAX_PEM = 8192;
/** An owner password is at most as long as a digest; more than any TPM takes. */
const MAX_OWNER_AUTH = 64;

/** The platform policy; works while the manager is locked too. */
export const platformRoutes: readonly Route[] = [
  {
    method: 'GET',
    path: '/platform',
    handle: async (_, { platform }) => ok(describe(await platform().view())),
  },
  call('/platform/requests', undefined, ['label', 'pcrs', 'next', 'pcrSelection'], ask),
  call('/platform/approvals', 'platform-approve', ['approval', 'authority'], approve),
  call('/platform/revocations', 'platform-revoke', ['survivors', 'ownerAuth'], revoke),
  call('/platform/policy', 'platform-authority', ['authority', 'pcrSelection', 'ownerAuth'], changePolicy),
  call('/platform/rotations', 'platform-rotate', ['ownerAuth'], rotate),
];

/** @param names members that the body may have */
function call(
  path: string,
  audits: AuditAction | undefined,
  names: readonly string[],
  handle: (body: Body, platform: PlatformControl, actor: AuditActor) => Promise<Answer>,
): Route {
  return {
    method: 'POST',
    path,
    ...(audits && { audits }),
    handle: async (request, { platform }) =>
      await handle(await bodyOf(request, names, MAX_BODY_BYTES), platform(), request.actor),
  };
}

type Body = Readonly<Record<string, unknown>>;

async function ask({ label, pcrs, next, pcrSelection }: Body, platform: PlatformControl): Promise<Answer> {
  if (typeof label !== 'string' || label === '' || label.length > MAX_LABEL) {
    throw new ManagerError('bad-request', `"label" is a text of 1 to ${MAX_LABEL} characters`);
  }
  if (next !== undefined && typeof next !== 'boolean') {
    throw new ManagerError('bad-request', '"next" is true or false');
  }
  const request = await platform.request(
    label,
    pcrValues(pcrs),
    next === true,
    optionalText('pcrSelection', pcrSelection, MAX_LABEL),
  );
  return { status: 200, body: request };
}

function pcrValues(pcrs: unknown): Record<string, string> {
  if (pcrs === undefined) return {};
  const isTable =
    typeof pcrs === 'object' &&
    pcrs !== null &&
    !Array.isArray(pcrs) &&
    Object.values(pcrs).every((value) => typeof value === 'string');
  if (!isTable) {
    throw new ManagerError('bad-request', '"pcrs" is an object like {"sha256:7": "64 hex digits"}');
  }
  return { ...pcrs } as Record<string, string>;
}

async function approve(
  { approval, authority }: Body,
  platform: PlatformControl,
  actor: AuditActor,
): Promise<Answer> {
  if (approval === undefined) throw new ManagerError('bad-request', '"approval" is missing');
  const given = optionalText('authority', authority, MAX_PEM);
  return { status: 201, body: describeOutcome(await platform.approve(actor, approval, given)) };
}

async function revoke({ survivors, ownerAuth }: Body, platform: PlatformControl, actor: AuditActor) {
  if (!Array.isArray(survivors) || survivors.length > MAX_SURVIVORS) {
    throw new ManagerError('bad-request', `"survivors" is a list of at most ${MAX_SURVIVORS} approvals`);
  }
  const { counter, revoked } = await withOwner(ownerAuth, (auth) => platform.revoke(actor, survivors, auth));
  return { status: 200, body: { counter: counter.toString(), revoked } };
}

async function changePolicy(
  { authority, pcrSelection, ownerAuth }: Body,
  platform: PlatformControl,
  actor: AuditActor,
): Promise<Answer> {
  if (authority === undefined && pcrSelection === undefined) {
    throw new ManagerError(
      'bad-request',
      'say what to change: "authority" (a public key in PEM, or null for none) or "pcrSelection"',
    );
  }
  const selection = optionalText('pcrSelection', pcrSelection, MAX_LABEL);
  const change = {
    ...(authority === null
      ? { authority }
      : authority !== undefined && { authority: optionalText('authority', authority, MAX_PEM) ?? null }),
    ...(selection !== undefined && { pcrSelection: selection }),
  };
  const enrolment = await withOwner(ownerAuth, (auth) => platform.adopt(actor, change, auth));
  return { status: 200, body: describePolicy(enrolment.tpm.root) };
}

async function rotate({ ownerAuth }: Body, platform: PlatformControl, actor: AuditActor): Promise<Answer> {
  const enrolment = await withOwner(ownerAuth, (auth) => platform.rotate(actor, auth));
  return { status: 200, body: describePolicy(enrolment.tpm.root) };
}

function describePolicy({
  generation,
  policy,
  pcrSelection,
}: {
  readonly generation: number;
  readonly policy: { readonly kind: string };
  readonly pcrSelection: string;
}): object {
  return { generation, policy: policy.kind, pcrSelection };
}

function describe({ counter, lockedBecause, erasure, authority, ...view }: PlatformView): object {
  return {
    ...view,
    authority: authority ?? null,
    counter: counter.toString(),
    lockedBecause: describeError(lockedBecause),
    erasure: erasure ? { since: time(erasure.since), due: time(erasure.due) } : null,
  };
}

function describeOutcome({ approval, isUnlocked, lockedBecause }: ApprovalOutcome): object {
  return { approval, isUnlocked, lockedBecause: describeError(lockedBecause) };
}

function describeError(error: ManagerError | undefined): object | null {
  return error ? { code: error.code, message: error.message } : null;
}

function time(milliseconds: number | undefined): string | null {
  return milliseconds === undefined ? null : new Date(milliseconds).toISOString();
}

function optionalText(name: string, value: unknown, limit: number): string | undefined {
  if (value === undefined) return undefined;
  if (typeof value !== 'string' || value === '' || value.length > limit) {
    throw new ManagerError('bad-request', `"${name}" is a text of 1 to ${limit} characters`);
  }
  return value;
}

async function withOwner<T>(hex: unknown, body: (auth: Buffer | undefined) => Promise<T>): Promise<T> {
  if (hex !== undefined && !(typeof hex === 'string' && /^([0-9a-f]{2})*$/.test(hex))) {
    throw new ManagerError('bad-request', '"ownerAuth" is the password of the owner in hex, in lower case');
  }
  if (hex !== undefined && hex.length > 2 * MAX_OWNER_AUTH) {
    throw new ManagerError('bad-request', `an owner password has at most ${MAX_OWNER_AUTH} bytes`);
  }
  const auth = hex === undefined ? undefined : Buffer.from(hex, 'hex');
  try {
    return await body(auth);
  } finally {
    wipe(auth);
  }
}
