import { bytesEqual, type Peer } from 'vtpm-proto';
import { ManagerError } from '../error.js';
import { checkAddress } from '../peer/address.js';

/** The whole configuration is one record; a peer is about 1 KiB of it. */
export const MAX_PEERS = 256;
export const MAX_ADDRESSES = 8;
export const MAX_PLATFORMS = 32;
/** TPMT_PUBLIC of an RSA 4096 key has less. */
const MAX_PUBLIC_BYTES = 1024;
const MAX_PEM = 1024;
const MAX_SELECTION = 200;
const MAX_ENDORSED_BY = 200;
const NAME = /^[a-z0-9][a-z0-9._-]{0,62}$/;

/** @throws ManagerError `bad-request` */
export function checkPeerName(name: string): void {
  if (NAME.test(name)) return;
  throw new ManagerError(
    'bad-request',
    'the name of a peer has 1 to 63 characters: a-z, 0-9, ".", "_" and "-", the first a letter or digit',
  );
}

/** What a peer is like, whatever others there are. @throws ManagerError `bad-request` */
export function checkPeer(peer: Peer): void {
  checkPeerName(peer.name);
  for (const [what, bytes] of [
    ['host id', peer.hostId],
    ['TLS key', peer.tlsKey],
    ['backup key', peer.backupKey],
  ] as const) {
    if (bytes.length !== 32) throw unfit(`its ${what} has ${bytes.length} bytes, not 32`);
  }
  if (peer.installation.length !== 16) throw unfit('its installation is no id of 16 bytes');
  for (const [what, bytes] of [
    ['endorsement key', peer.endorsementKey],
    ['attestation key', peer.attestationKey],
  ] as const) {
    if (bytes.length === 0 || bytes.length > MAX_PUBLIC_BYTES) throw unfit(`its ${what} is none`);
  }
  if (peer.endorsedBy === '' || peer.endorsedBy.length > MAX_ENDORSED_BY) {
    throw unfit('it does not say who vouches for its endorsement key');
  }
  if (peer.addresses.length > MAX_ADDRESSES) throw unfit(`it has more than ${MAX_ADDRESSES} addresses`);
  for (const address of peer.addresses) checkAddress(address);
  if (new Set(peer.addresses).size < peer.addresses.length) throw unfit('it has an address twice');
  if (peer.platforms.length > MAX_PLATFORMS) {
    throw unfit(`it has more than ${MAX_PLATFORMS} approved platforms; remove old ones first`);
  }
  for (const { pcrSelection, pcrDigest } of peer.platforms) {
    if (pcrDigest.length !== 32 || pcrSelection === '' || pcrSelection.length > MAX_SELECTION) {
      throw unfit('an approved platform is a PCR selection and a digest of 32 bytes');
    }
  }
  if (peer.policyAuthority.length > MAX_PEM) throw unfit('its policy authority is no public key in PEM');
}

/** @throws ManagerError `peer-exists`, `bad-request` */
export function checkNewPeer(peers: readonly Peer[], added: Peer): void {
  for (const peer of peers) {
    for (const [what, isSame] of [
      ['name', peer.name === added.name],
      ['host id', bytesEqual(peer.hostId, added.hostId)],
      ['TLS key', bytesEqual(peer.tlsKey, added.tlsKey)],
      ['endorsement key', bytesEqual(peer.endorsementKey, added.endorsementKey)],
    ] as const) {
      if (!isSame) continue;
      throw new ManagerError(
        'peer-exists',
        `there is a peer with this ${what} already: ${peer.name}; change that one, or remove it first: vtpmctl peer remove ${peer.name}`,
      );
    }
  }
  if (peers.length >= MAX_PEERS) {
    throw new ManagerError('bad-request', `there are ${MAX_PEERS} peers; remove old ones first`);
  }
}

/**
 * @param right what the peer does: send a vTPM to this host, or receive one from it
 * @throws ManagerError `peer-forbidden`
 */
export function checkRight(peer: Peer, right: 'send' | 'receive'): void {
  if (right === 'send' ? peer.maySend : peer.mayReceive) return;
  const what = right === 'send' ? 'vTPMs do not come from' : 'vTPMs do not go to';
  throw new ManagerError(
    'peer-forbidden',
    `${what} ${peer.name}: it was added so; to change it: vtpmctl peer change ${peer.name} --${right}`,
  );
}

export function unknownPeer(name: string): ManagerError {
  return new ManagerError(
    'unknown-peer',
    `there is no peer ${name.slice(0, 63)}; see them: vtpmctl peer list`,
  );
}

function unfit(why: string): ManagerError {
  return new ManagerError('bad-request', `this peer cannot be kept: ${why}`);
}
