import type { Logger } from 'vtpm-common';
import type { Peer } from 'vtpm-proto';
import type { AuditActor, AuditLog } from '../audit/index.js';
import { ManagerError } from '../error.js';
import type { KeyHierarchy } from '../keys/index.js';
import { readSelection } from '../root-tpm/enrolment.js';
import { attestationPublic, type RootTpm, type RootTpmEnrolment, readAuthority } from '../root-tpm/index.js';
import { checkPeerName, unknownPeer } from '../trust/peers.js';
import type { TrustStore } from '../trust/trust-configuration.js';
import type { PeerAddress } from './address.js';
import type { PeerChannel } from './channel.js';
import { acceptEndorsement, type EndorsementTrust } from './endorsement.js';
import { hostIdentity } from './identity.js';
import {
  type HostFacts,
  platformDigest,
  readIdentity,
  renderIdentity,
  type VerifiedIdentity,
} from './identity-file.js';
import { type ListeningAddress, type PeerListener, servePeers } from './listener.js';

export interface PeerControlParts {
  readonly keys: KeyHierarchy;
  readonly trust: TrustStore;
  readonly audit: AuditLog;
  readonly log: Logger;
  readonly tpm: () => Pick<RootTpm, 'endorsement' | 'makeAttestationKey' | 'quote'>;
  /** As it is now: a rotation may change the registers. */
  readonly enrolment: () => RootTpmEnrolment;
  /** Of the setting peer-listen. */
  readonly addresses: readonly PeerAddress[];
  exchange(channel: PeerChannel): Promise<void>;
  /** Called before a peer is removed. @throws ManagerError that says what it is needed for */
  checkNotNeeded(peer: Peer): Promise<void>;
}

/** What this host says of itself. */
export interface OwnIdentity extends VerifiedIdentity {
  /** The file for other hosts: one line. */
  readonly text: string;
  readonly listening: readonly ListeningAddress[];
}

/** A register selection and the digest over its values. */
export interface PlatformName {
  readonly pcrSelection: string;
  readonly pcrDigest: Uint8Array;
}

export interface NewPeer {
  readonly name: string;
  /** Text of its identity file. */
  readonly identity: string;
  readonly endorsement: EndorsementTrust;
  readonly addresses: readonly string[];
  /** Whether the platform that the identity shows is approved. */
  readonly approveCurrent: boolean;
  /** PEM; undefined for none. */
  readonly authority: string | undefined;
  readonly maySend: boolean;
  readonly mayReceive: boolean;
}

/** What is undefined stays. */
export interface PeerChange {
  readonly addresses?: readonly string[] | undefined;
  /** PEM; null for none. */
  readonly authority?: string | null | undefined;
  readonly maySend?: boolean | undefined;
  readonly mayReceive?: boolean | undefined;
  /** A new identity file of the same host: the platform that it shows is approved. */
  readonly identity?: string | undefined;
  readonly approve?: readonly PlatformName[] | undefined;
  readonly withdraw?: readonly PlatformName[] | undefined;
}

/** What an operator does with other hosts, and the door for them. */
export class PeerControl {
  private constructor(
    private readonly parts: PeerControlParts,
    private readonly listener: PeerListener,
  ) {}

  static async open(parts: PeerControlParts): Promise<PeerControl> {
    return new PeerControl(parts, await servePeers({ ...parts, identity: hostIdentity(parts.keys) }));
  }

  /** Takes no connections of other hosts any more, ends those that there are. */
  async close(): Promise<void> {
    await this.listener.close();
  }

  /** Makes the attestation key where there is none yet. @throws ManagerError the TPM's */
  async self(actor: AuditActor): Promise<OwnIdentity> {
    const { keys } = this.parts;
    const tpm = this.parts.tpm();
    const enrolment = this.parts.enrolment();
    const attestationKey = await this.#attestationKey(actor, enrolment);
    const { publicArea, certificates } = await tpm.endorsement();
    const facts: HostFacts = {
      hostId: keys.hostKey.publicKey,
      tlsKey: hostIdentity(keys).tls.publicKey,
      backupKey: keys.backupKey.publicKey,
      installation: Buffer.from(enrolment.installation, 'hex'),
      revocationHandle: enrolment.revocation.handle,
      tpm: { kind: enrolment.kind, manufacturer: enrolment.manufacturer.replace(/[^ -~]/g, '?') || '?' },
      endorsementKey: publicArea,
      attestationKey: attestationPublic(Buffer.from(attestationKey)),
      certificates,
      createdAt: new Date().toISOString(),
    };
    const { pcrSelection } = enrolment.root;
    const quote = await tpm.quote(enrolment, attestationKey, pcrSelection, platformDigest(facts));
    const text = renderIdentity(facts, { ...quote, pcrSelection }, keys.hostKey);
    // Read as the other host reads it: one that it would refuse is not given out.
    return { ...readIdentity(text), text, listening: this.listener.listening };
  }

  list(): readonly Peer[] {
    return this.parts.trust.peers();
  }

  /** @throws ManagerError `peer-exists`, `peer-ek`, `peer-ak`, `peer-unattested`, `bad-request`, `newer-format` */
  async add(actor: AuditActor, added: NewPeer): Promise<Peer> {
    const { trust, audit } = this.parts;
    checkPeerName(added.name);
    const { facts, platform } = readIdentity(added.identity);
    const offered = { publicArea: facts.endorsementKey, certificates: facts.certificates };
    const endorsedBy = acceptEndorsement(offered, added.endorsement);
    const now = BigInt(Date.now());
    const peer: Peer = {
      ...identityOf(facts),
      name: added.name,
      addresses: [...added.addresses],
      endorsedBy: endorsedBy.slice(0, 200),
      provenAt: 0n,
      platforms: added.approveCurrent ? [approvedNow(platform, now)] : [],
      policyAuthority: added.authority === undefined ? '' : readAuthority(added.authority),
      maySend: added.maySend,
      mayReceive: added.mayReceive,
      addedAt: now,
    };
    const event = { actor, action: 'peer-add', facts: { ...whoIs(peer), endorsedBy } } as const;
    await audit.append({ ...event, verdict: 'intended' });
    await trust.addPeer(peer);
    await audit.append({ ...event, verdict: 'done' });
    return peer;
  }

  /** @throws ManagerError `unknown-peer`, `bad-request`, and of an identity what `add` throws */
  async change(actor: AuditActor, name: string, change: PeerChange): Promise<Peer> {
    const { trust, audit } = this.parts;
    const known = trust.peerNamed(name);
    if (!known) throw unknownPeer(name);
    const now = BigInt(Date.now());
    const approved = (change.approve ?? []).map((platform) => approvedNow(platform, now));
    const withdrawn = (change.withdraw ?? []).map((platform) => approvedNow(platform, now));
    let moved: Partial<Peer> = {};
    if (change.identity !== undefined) {
      const { facts, platform } = readIdentity(change.identity);
      checkSameHost(known, facts);
      approved.push(approvedNow(platform, now));
      moved = { installation: facts.installation, revocationHandle: facts.revocationHandle };
    }
    const authority = change.authority ? readAuthority(change.authority) : change.authority;
    const event = {
      actor,
      action: 'peer-change',
      facts: {
        ...whoIs(known),
        ...changedFacts(change, approved.map(platformText), withdrawn.map(platformText)),
      },
    } as const;
    await audit.append({ ...event, verdict: 'intended' });
    const changed = await trust.changePeer(name, (peer) => {
      const left = peer.platforms.filter((one) => !approved.some((other) => isSame(one, other)));
      const missing = withdrawn.find((one) => !peer.platforms.some((other) => isSame(one, other)));
      if (missing) {
        throw new ManagerError('bad-request', `${platformText(missing)} is not approved for ${name}`);
      }
      const platforms = [...left, ...approved].filter(
        (one) => !withdrawn.some((other) => isSame(one, other)),
      );
      return {
        ...peer,
        ...moved,
        platforms,
        ...(change.addresses && { addresses: [...change.addresses] }),
        ...(authority !== undefined && { policyAuthority: authority ?? '' }),
        ...(change.maySend !== undefined && { maySend: change.maySend }),
        ...(change.mayReceive !== undefined && { mayReceive: change.mayReceive }),
      };
    });
    await audit.append({ ...event, verdict: 'done' });
    return changed;
  }

  /** Its connections are cut before this resolves. @throws ManagerError `unknown-peer`; `in-doubt`, `busy` where it is needed still */
  async remove(actor: AuditActor, name: string): Promise<void> {
    const { trust, audit } = this.parts;
    const known = trust.peerNamed(name);
    if (!known) throw unknownPeer(name);
    await this.parts.checkNotNeeded(known);
    const event = { actor, action: 'peer-remove', facts: whoIs(known) } as const;
    await audit.append({ ...event, verdict: 'intended' });
    await trust.removePeer(name);
    await audit.append({ ...event, verdict: 'done' });
  }

  async #attestationKey(actor: AuditActor, enrolment: RootTpmEnrolment): Promise<Uint8Array> {
    const { trust, audit, tpm } = this.parts;
    return await trust.ensureAttestationKey(async () => {
      const key = await tpm().makeAttestationKey(enrolment);
      await audit.append({ actor, action: 'peer-identity', verdict: 'done' });
      return key;
    });
  }
}

/** Who a peer is, as its identity says. */
function identityOf(facts: HostFacts) {
  const { hostId, tlsKey, backupKey, endorsementKey, attestationKey, installation, revocationHandle } = facts;
  return { hostId, tlsKey, backupKey, endorsementKey, attestationKey, installation, revocationHandle };
}

function whoIs({ name, hostId }: Peer): { readonly peer: string; readonly hostId: string } {
  return { peer: name, hostId: Buffer.from(hostId).toString('hex') };
}

/** @throws ManagerError `bad-request` */
function approvedNow({ pcrSelection, pcrDigest }: PlatformName, now: bigint): Peer['platforms'][number] {
  readSelection(pcrSelection);
  return { pcrSelection, pcrDigest: Buffer.from(pcrDigest), approvedAt: now };
}

function isSame(one: PlatformName, other: PlatformName): boolean {
  return one.pcrSelection === other.pcrSelection && Buffer.compare(one.pcrDigest, other.pcrDigest) === 0;
}

function platformText({ pcrSelection, pcrDigest }: PlatformName): string {
  return `${pcrSelection}=${Buffer.from(pcrDigest).toString('hex')}`;
}

function checkSameHost(known: Peer, facts: HostFacts): void {
  const given = identityOf(facts);
  for (const what of ['hostId', 'tlsKey', 'backupKey', 'endorsementKey', 'attestationKey'] as const) {
    if (Buffer.compare(known[what], given[what]) === 0) continue;
    throw new ManagerError(
      'bad-request',
      `this is not the identity of ${known.name}: its ${what} is another. Where the host was made anew or has another ` +
        `TPM it is another peer: vtpmctl peer remove ${known.name}, then vtpmctl peer add`,
    );
  }
}

function changedFacts(
  { addresses, authority, maySend, mayReceive }: PeerChange,
  approved: readonly string[],
  withdrawn: readonly string[],
): Readonly<Record<string, string>> {
  return {
    ...(approved.length > 0 && { approved: approved.join(' ') }),
    ...(withdrawn.length > 0 && { withdrawn: withdrawn.join(' ') }),
    ...(addresses && { addresses: addresses.join(' ') }),
    ...(authority !== undefined && { authority: authority === null ? 'none' : 'changed' }),
    ...(maySend !== undefined && { maySend: String(maySend) }),
    ...(mayReceive !== undefined && { mayReceive: String(mayReceive) }),
  };
}
