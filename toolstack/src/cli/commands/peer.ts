import { parseHostPort } from 'vtpm-common';
import { ToolstackError } from '../../error.js';
import type { Context } from '../context.js';
import { readGivenFile } from '../given-files.js';
import { findPeer } from '../migration/order.js';
import { fields, table, time } from '../output.js';
import type { ManagerPeer, PlatformName } from '../peer-api.js';
import { fingerprint } from './platform.js';

export interface AddPeerFlags {
  readonly address?: readonly string[];
  readonly ekCa?: string;
  readonly ekFingerprint?: string;
  readonly approveCurrent?: boolean;
  readonly authority?: string;
  readonly send: boolean;
  readonly receive: boolean;
}

export interface ChangePeerFlags {
  readonly address?: readonly string[];
  readonly authority?: string | false;
  readonly send?: boolean;
  readonly receive?: boolean;
}

export interface ApproveFlags {
  readonly current?: string;
  readonly pcrs?: readonly string[];
  readonly withdraw?: readonly string[];
}

/** Prints the identity for other hosts, alone on standard output; what people compare is on standard error. */
export async function peerIdentity({ manager, output }: Context): Promise<void> {
  const own = await manager.peer.identity();
  output.result(own, own.identity);
  if (output.isJson) return;
  const { endorsement, platform, listening } = own;
  const certificate = endorsement.isCertified
    ? "its TPM's maker certifies its endorsement key: --ek-ca FILE with the maker's certificates"
    : 'no certificate vouches for its endorsement key: --ek-fingerprint, compared here and there';
  output.note(
    fields([
      ['host id', own.hostId],
      ['EK fingerprint', endorsement.fingerprint],
      ['', certificate],
      ['platform', platformText(platform)],
      [
        'listens on',
        listening.map(listeningText).join(', ') || 'nothing: vTPMs cannot come here (peer-listen)',
      ],
    ]),
  );
  const address = listening[0]?.address ?? 'HOST:PORT';
  const trust = endorsement.isCertified ? '--ek-ca FILE' : `--ek-fingerprint ${endorsement.fingerprint}`;
  output.note(
    `take the line above into a file to the other host, and there: vtpmctl peer add NAME FILE --address ${address} ${trust} --approve-current`,
  );
}

export async function addPeer(
  name: string,
  file: string,
  flags: AddPeerFlags,
  { manager, output }: Context,
): Promise<void> {
  if ((flags.ekCa === undefined) === (flags.ekFingerprint === undefined)) {
    throw new ToolstackError(
      'usage',
      `say by what the TPM of ${name} is known: --ek-ca FILE (certificates of its maker in PEM) or --ek-fingerprint HEX (read at the host itself: vtpmctl peer identity)`,
    );
  }
  if (flags.ekFingerprint !== undefined && !/^[0-9a-f]{64}$/i.test(flags.ekFingerprint)) {
    throw new ToolstackError(
      'usage',
      `--ek-fingerprint is 64 hex digits, as vtpmctl peer identity shows them at ${name} itself, not "${flags.ekFingerprint}"`,
    );
  }
  const peer = await manager.peer.add({
    name,
    identity: readGivenFile('FILE', file),
    ...(flags.ekCa !== undefined && { ekCa: readGivenFile('--ek-ca', flags.ekCa) }),
    ...(flags.ekFingerprint !== undefined && { ekFingerprint: flags.ekFingerprint }),
    addresses: addressesOf(flags.address ?? []),
    approveCurrent: flags.approveCurrent === true,
    ...(flags.authority !== undefined && { authority: readGivenFile('--authority', flags.authority) }),
    maySend: flags.send,
    mayReceive: flags.receive,
  });
  output.result(peer, describe(peer));
  for (const step of nextSteps(peer)) output.note(step);
  output.note(
    `${name} must know this host too: vtpmctl peer identity > this.peer here, then on ${name}: vtpmctl peer add`,
  );
}

export async function listPeers({ manager, output }: Context): Promise<void> {
  const peers = await manager.peer.list();
  const rows = peers.map((peer) => [
    peer.name,
    peer.addresses[0] ?? '-',
    peer.provenAt === null ? 'not yet' : `since ${time(peer.provenAt)}`,
    approvedText(peer),
    rights(peer),
    peer.hostId.slice(0, 16),
  ]);
  output.result(
    { peers },
    rows.length === 0
      ? 'no other host is known; to make one known: vtpmctl peer identity there, vtpmctl peer add here'
      : table(['NAME', 'ADDRESS', 'PROVEN', 'PLATFORM', 'VTPMS', 'HOST ID'], rows),
  );
}

export async function showPeer(name: string, { manager, output }: Context): Promise<void> {
  const peer = await findPeer(name, { manager });
  output.result(peer, describe(peer));
  for (const step of nextSteps(peer)) output.note(step);
}

export async function changePeer(
  name: string,
  { address, authority, send, receive }: ChangePeerFlags,
  { manager, output }: Context,
): Promise<void> {
  const peer = await manager.peer.change(name, {
    ...(address !== undefined && { addresses: addressesOf(address) }),
    ...(authority !== undefined && {
      authority: authority === false ? null : readGivenFile('--authority', authority),
    }),
    ...(send !== undefined && { maySend: send }),
    ...(receive !== undefined && { mayReceive: receive }),
  });
  output.result(peer, describe(peer));
  for (const step of nextSteps(peer)) output.note(step);
}

export async function approvePeer(
  name: string,
  { current, pcrs, withdraw }: ApproveFlags,
  { manager, output }: Context,
): Promise<void> {
  if (current === undefined && pcrs === undefined && withdraw === undefined) {
    throw new ToolstackError(
      'usage',
      `say which platform of ${name}: --current FILE (a new vtpmctl peer identity of it), or --pcrs SELECTION=DIGEST`,
    );
  }
  const peer = await manager.peer.change(name, {
    ...(current !== undefined && { identity: readGivenFile('--current', current) }),
    ...(pcrs !== undefined && { approve: pcrs.map(platformOf) }),
    ...(withdraw !== undefined && { withdraw: withdraw.map(platformOf) }),
  });
  output.result(peer, describe(peer));
  for (const step of nextSteps(peer)) output.note(step);
}

export async function removePeer(name: string, { manager, output }: Context): Promise<void> {
  await manager.peer.remove(name);
  output.result({ name }, `${name} is no peer any more; what was connected with it is cut`);
}

function addressesOf(texts: readonly string[]): readonly string[] {
  try {
    texts.forEach(parseHostPort);
    return texts;
  } catch (cause) {
    throw new ToolstackError('usage', `--address: ${(cause as Error).message}`, { cause });
  }
}

function platformOf(text: string): PlatformName {
  const [, pcrSelection = '', pcrDigest = ''] = /^(.+)=([0-9a-fA-F]{64})$/.exec(text) ?? [];
  if (pcrSelection !== '') return { pcrSelection, pcrDigest: pcrDigest.toLowerCase() };
  throw new ToolstackError(
    'usage',
    `"${text}" is no platform; it is SELECTION=DIGEST, like sha256:0,7=64 hex digits, as vtpmctl peer show prints it`,
  );
}

function platformText({ pcrSelection, pcrDigest }: PlatformName): string {
  return `${pcrSelection}=${pcrDigest}`;
}

function listeningText({ address, failure }: { address: string; failure: string | null }): string {
  return failure === null ? address : `${address} (not: ${failure})`;
}

function approvedText({ platforms, authority }: ManagerPeer): string {
  const count = platforms.length === 0 ? [] : [`${platforms.length} approved`];
  const parts = authority === null ? count : [...count, 'by its authority'];
  return parts.join(', ') || 'none approved';
}

function rights({ maySend, mayReceive }: ManagerPeer): string {
  if (maySend) return mayReceive ? 'come and go' : 'come';
  return mayReceive ? 'go' : 'none';
}

function describe(peer: ManagerPeer): string {
  return fields([
    ['name', peer.name],
    ['addresses', peer.addresses.join(', ') || 'none'],
    ['host id', peer.hostId],
    ['TLS key', peer.tlsKey],
    ['EK fingerprint', peer.endorsement.fingerprint],
    ['known by', peer.endorsement.by],
    [
      'proven',
      peer.provenAt === null
        ? 'not yet: at the first migration its TPM shows that it has both keys'
        : `since ${time(peer.provenAt)}: its TPM has shown that it has both keys`,
    ],
    ['vTPMs', rights(peer)],
    ['authority', peer.authority === null ? null : fingerprint(peer.authority)],
    ...peer.platforms.map(
      (one) => ['platform', `${platformText(one)} since ${time(one.approvedAt)}`] as const,
    ),
    ['added', time(peer.addedAt)],
  ]);
}

/** What is still missing before vTPMs go there or come from there. */
function nextSteps(peer: ManagerPeer): string[] {
  const { name, addresses, platforms, authority, mayReceive } = peer;
  return [
    ...(addresses.length === 0 && mayReceive
      ? [`no vTPM can go there before it has an address: vtpmctl peer change ${name} --address HOST:PORT`]
      : []),
    ...(platforms.length === 0 && authority === null
      ? [
          `no platform of it is approved, so no vTPM goes or comes: vtpmctl peer approve ${name} --current FILE, or vtpmctl peer change ${name} --authority PEM`,
        ]
      : []),
  ];
}
