import type { Peer } from 'vtpm-proto';
import { ManagerError } from '../error.js';
import type { OwnIdentity, PlatformName } from '../peer/control.js';
import { type EndorsementTrust, endorsementFingerprint } from '../peer/endorsement.js';
import { type AdminContext, type AdminRequest, type Answer, bodyOf, ok, type Route, time } from './route.js';

/** Certificates of many authorities. */
const MAX_BODY_BYTES = 1024 * 1024;
const MAX_TEXT = 512 * 1024;
const MAX_LIST = 64;
const ADDED = [
  'name',
  'identity',
  'ekCa',
  'ekFingerprint',
  'addresses',
  'approveCurrent',
  'authority',
  'maySend',
  'mayReceive',
];
const CHANGED = ['addresses', 'authority', 'maySend', 'mayReceive', 'identity', 'approve', 'withdraw'];

export const peerRoutes: readonly Route[] = [
  { method: 'GET', path: '/identity', audits: 'peer-identity', handle: self },
  {
    method: 'GET',
    path: '/peers',
    handle: (_, { service }) => ok({ peers: service().peers.list().map(describePeer) }),
  },
  { method: 'POST', path: '/peers', audits: 'peer-add', handle: add },
  { method: 'PATCH', path: '/peers/{name}', audits: 'peer-change', handle: change },
  { method: 'DELETE', path: '/peers/{name}', audits: 'peer-remove', handle: remove },
];

async function self({ actor }: AdminRequest, { service }: AdminContext): Promise<Answer> {
  return ok(describeSelf(await service().peers.self(actor)));
}

async function add(request: AdminRequest, { service }: AdminContext): Promise<Answer> {
  const { peers } = service();
  const body = await bodyOf(request, ADDED, MAX_BODY_BYTES);
  const peer = await peers.add(request.actor, {
    name: text('name', body.name),
    identity: text('identity', body.identity),
    endorsement: endorsement(body),
    addresses: texts('addresses', body.addresses) ?? [],
    approveCurrent: flag('approveCurrent', body.approveCurrent) ?? false,
    authority: optional('authority', body.authority),
    maySend: flag('maySend', body.maySend) ?? true,
    mayReceive: flag('mayReceive', body.mayReceive) ?? true,
  });
  return { status: 201, body: describePeer(peer) };
}

async function change(request: AdminRequest, { service }: AdminContext): Promise<Answer> {
  const { peers } = service();
  const body = await bodyOf(request, CHANGED, MAX_BODY_BYTES);
  if (Object.keys(body).length === 0) {
    throw new ManagerError('bad-request', `say what to change: ${CHANGED.join(', ')}`);
  }
  const peer = await peers.change(request.actor, request.param('name'), {
    addresses: texts('addresses', body.addresses),
    authority: body.authority === null ? null : optional('authority', body.authority),
    maySend: flag('maySend', body.maySend),
    mayReceive: flag('mayReceive', body.mayReceive),
    identity: optional('identity', body.identity),
    approve: platforms('approve', body.approve),
    withdraw: platforms('withdraw', body.withdraw),
  });
  return ok(describePeer(peer));
}

async function remove(request: AdminRequest, { service }: AdminContext): Promise<Answer> {
  const name = request.param('name');
  await service().peers.remove(request.actor, name);
  return ok({ name });
}

/** Never in silence: who adds a peer says by what he knows its TPM. */
function endorsement({ ekCa, ekFingerprint }: Readonly<Record<string, unknown>>): EndorsementTrust {
  if ((ekCa === undefined) === (ekFingerprint === undefined)) {
    throw new ManagerError(
      'bad-request',
      'say by what the TPM of the other host is known: "ekCa" (certificates of its maker in PEM) or "ekFingerprint" ' +
        '(read at the host itself: vtpmctl peer identity)',
    );
  }
  return ekCa === undefined
    ? { fingerprint: text('ekFingerprint', ekFingerprint) }
    : { ca: text('ekCa', ekCa) };
}

function describeSelf({ text: identity, facts, platform, listening }: OwnIdentity): object {
  return {
    identity,
    hostId: facts.hostId.toString('hex'),
    tlsKey: facts.tlsKey.toString('hex'),
    endorsement: {
      fingerprint: endorsementFingerprint(facts.endorsementKey),
      isCertified: facts.certificates.length > 0,
    },
    tpm: facts.tpm,
    platform: {
      pcrSelection: platform.pcrSelection,
      pcrDigest: platform.pcrDigest.toString('hex'),
      pcrs: platform.pcrs,
    },
    listening: listening.map(({ address, failure }) => ({ address, failure: failure ?? null })),
  };
}

function describePeer(peer: Peer): object {
  return {
    name: peer.name,
    hostId: hex(peer.hostId),
    tlsKey: hex(peer.tlsKey),
    addresses: peer.addresses,
    endorsement: { fingerprint: endorsementFingerprint(peer.endorsementKey), by: peer.endorsedBy },
    provenAt: time(peer.provenAt),
    platforms: peer.platforms.map(({ pcrSelection, pcrDigest, approvedAt }) => ({
      pcrSelection,
      pcrDigest: hex(pcrDigest),
      approvedAt: time(approvedAt),
    })),
    authority: peer.policyAuthority === '' ? null : peer.policyAuthority,
    maySend: peer.maySend,
    mayReceive: peer.mayReceive,
    addedAt: time(peer.addedAt),
  };
}

const hex = (bytes: Uint8Array): string => Buffer.from(bytes).toString('hex');

function text(name: string, value: unknown): string {
  if (typeof value === 'string' && value !== '' && value.length <= MAX_TEXT) return value;
  throw new ManagerError('bad-request', `"${name}" is a text of 1 to ${MAX_TEXT} characters`);
}

function optional(name: string, value: unknown): string | undefined {
  return value === undefined ? undefined : text(name, value);
}

function flag(name: string, value: unknown): boolean | undefined {
  if (value === undefined || typeof value === 'boolean') return value;
  throw new ManagerError('bad-request', `"${name}" is true or false`);
}

function list(name: string, value: unknown): unknown[] {
  if (Array.isArray(value) && value.length <= MAX_LIST) return value;
  throw new ManagerError('bad-request', `"${name}" is a list of at most ${MAX_LIST}`);
}

function texts(name: string, value: unknown): string[] | undefined {
  return value === undefined ? undefined : list(name, value).map((one) => text(name, one));
}

function platforms(name: string, value: unknown): PlatformName[] | undefined {
  if (value === undefined) return undefined;
  return list(name, value).map((one) => {
    const { pcrSelection, pcrDigest, ...others } = Object(one) as Record<string, unknown>;
    if (
      typeof pcrSelection === 'string' &&
      typeof pcrDigest === 'string' &&
      /^[0-9a-f]{64}$/.test(pcrDigest) &&
      Object.keys(others).length === 0
    ) {
      return { pcrSelection, pcrDigest: Buffer.from(pcrDigest, 'hex') };
    }
    throw new ManagerError(
      'bad-request',
      `"${name}" is a list of {"pcrSelection": "sha256:7", "pcrDigest": "64 hex digits"}`,
    );
  });
}
