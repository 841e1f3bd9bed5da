import { randomBytes } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { createLogger } from 'vtpm-common';
import { type Enrolment, readEnrolment } from 'vtpm-manager/enrolment';
import { hkdf, type KeyHierarchy, openInstallationSecrets, wipe } from 'vtpm-manager/keys/index';
import { TpmAttestor } from 'vtpm-manager/migration/attestor';
import { type StateParts, sealBundle } from 'vtpm-manager/migration/bundle';
import type { Attestor } from 'vtpm-manager/migration/ports';
import { StateKeys, sharedSecret } from 'vtpm-manager/migration/state-key';
import { Talk } from 'vtpm-manager/migration/talk';
import { signDecision } from 'vtpm-manager/ownership/decisions';
import type { PeerChannel } from 'vtpm-manager/peer/channel';
import { dialPeer } from 'vtpm-manager/peer/dial';
import { hostIdentity } from 'vtpm-manager/peer/identity';
import { servePeers } from 'vtpm-manager/peer/listener';
import { type ImportKey, openRootTpm, type RootTpm } from 'vtpm-manager/root-tpm/index';
import { openLmdbStore } from 'vtpm-manager/store/index';
import { openTrustStore, type TrustStore } from 'vtpm-manager/trust/trust-configuration';
import { rootKeysOf, unlock } from 'vtpm-manager/unlock';
import {
  type BundleHeader,
  boxKeyPair,
  decode,
  type MigrationHello,
  type MigrationOffer,
  type PeerMessage,
  uuidToBytes,
  type Verdict,
} from 'vtpm-proto';
import type { Host } from './two-hosts.js';

const log = createLogger('test', { 'log-level': 'silent', 'log-format': 'json' });

/**
 * A host whose root is hostile: its manager is stopped, and the test speaks with all its keys, and with its chip, which shows
 * a platform that is approved.
 */
export class HostileHost {
  private constructor(
    readonly host: Host,
    readonly keys: KeyHierarchy,
    readonly attestor: Attestor,
    readonly trust: TrustStore,
    private readonly root: RootTpm,
    private readonly enrolment: Enrolment,
  ) {}

  static async takeOver(host: Host): Promise<HostileHost> {
    const { installation } = host;
    await installation.stopDaemons();
    const paths = installation.paths.manager;
    const root = await openRootTpm({ kind: 'unix', path: installation.tpm?.socket ?? '' });
    const { keys, enrolment } = await unlock(root, paths, readEnrolment(paths), []);
    const raw = await openLmdbStore({
      ...{ directory: paths.store, create: false, sandbox: false, log },
      onLost: (error) => {
        throw error;
      },
    });
    const store = { read: (key: string) => raw.get(key) } as unknown as Parameters<typeof openTrustStore>[1];
    const trust = await openTrustStore(keys, store);
    await raw.close();
    const attestor = new TpmAttestor({
      tpm: () => root,
      enrolment: () => enrolment.tpm,
      trust: {
        ensureAttestationKey: async () => trust.attestationKey() ?? NOTHING,
        changePeer: (...change) => trust.changePeer(...change),
      },
      approvals: () => [],
    });
    return new HostileHost(host, keys, attestor, trust, root, enrolment);
  }

  /** A session that its own manager could have begun. */
  dial(victim: Host): Promise<PeerChannel> {
    const peer = this.trust.peerNamed(victim.name);
    if (!peer) throw new Error(`${this.host.name} does not know ${victim.name}`);
    return dialPeer(peer, { identity: hostIdentity(this.keys), trust: this.trust, log });
  }

  /** Answers in its manager's place. @returns ends it */
  async listen(exchange: (channel: PeerChannel) => Promise<void>): Promise<() => Promise<void>> {
    const { v4, port } = this.host.place;
    const listener = await servePeers({
      addresses: [{ host: v4, port }],
      identity: hostIdentity(this.keys),
      trust: this.trust,
      audit: { append: async () => ({ length: 0n, digest: NOTHING }) },
      log,
      exchange,
    });
    return () => listener.close();
  }

  /** Of its TLS certificate. */
  get tlsKey(): Buffer {
    return hostIdentity(this.keys).tls.publicKey;
  }

  /** Everything of 32 bytes that it keeps for more than one migration, and that comes of it. */
  async longTermSecrets(): Promise<Buffer[]> {
    const { toolstack, supervisor } = this.host.installation.paths;
    const rootKey = await this.root.releaseRootKey(this.enrolment.tpm, []);
    const root = rootKeysOf(rootKey, this.enrolment);
    const secrets = openInstallationSecrets(root, Buffer.from(this.enrolment.keyring, 'base64'));
    const files = [toolstack.key, supervisor.delegateKey].map((path) => readFileSync(path));
    const made = [this.keys.identity.secretKey, this.keys.peerTlsSeed];
    const seeds = ['vtpm.v1 host identity', 'vtpm.v1 backup signature'].map((purpose) =>
      hkdf(secrets.identity, root.storeId, purpose),
    );
    const buffers = Object.values(root).filter((value): value is Buffer => Buffer.isBuffer(value));
    return [rootKey, ...Object.values(secrets), ...seeds, ...files, ...made, ...buffers]
      .map((key) => Buffer.from(key as Uint8Array))
      .filter(({ length }) => length === 32);
  }

  async close(): Promise<void> {
    this.keys.wipe();
    await this.root.close();
  }
}

/** A vTPM that is not there. */
export interface Pretended {
  readonly vtpmUuid: Buffer;
  readonly vmUuid: Buffer;
  readonly name: string;
}

/** The source's side of a migration, step by step, for who does not keep to it. Offline: nothing has to be frozen. */
export class ScriptedSource {
  readonly talk: Talk;
  readonly #session = boxKeyPair();
  keys: StateKeys | undefined;
  offer: MigrationOffer | undefined;
  hello: MigrationHello;

  constructor(
    private readonly hostile: HostileHost,
    victim: Host,
    channel: PeerChannel,
    { vtpmUuid, vmUuid, name }: Pretended,
    changes: Partial<MigrationHello> = {},
  ) {
    this.talk = new Talk(channel, 'source');
    const description = {
      ...{ format: 1, name, isolation: 'sandbox', autostart: false, startup: 'clear' },
      ...{ doors: ['tpm'], stateBlobs: 'reference', socketMode: '0600' },
    };
    this.hello = {
      ...{ leastVersion: 1, mostVersion: 1, migrationId: randomBytes(16), nonce: randomBytes(32) },
      ...{ sessionKey: this.#session.publicKey, source: hostile.keys.hostKey.publicKey },
      ...{ destination: Buffer.from(victim.hostId, 'hex'), vtpmUuid, vmUuid, epoch: 3n, generation: 7n },
      ...{ mode: 'OFFLINE', recordFormat: 1, libtpmsVersion: '0.9.2', stateBytes: 100_000n },
      ...{ description: Buffer.from(JSON.stringify(description)), dryRun: false, vmRunId: Buffer.alloc(16) },
      ...changes,
    };
  }

  /** @throws ManagerError the destination's refusal */
  async greet(): Promise<void> {
    const challenge = this.hostile.attestor.challenge(this.talk.peer);
    await this.talk.send('HELLO', { ...this.hello, ...(challenge && { challenge: challenge.challenge }) });
  }

  async attest(): Promise<void> {
    const { talk, hostile } = this;
    const greeted = talk.transcript.digest;
    const offer = await talk.receive('OFFER', LIMIT_MS);
    offer.accept();
    this.offer = offer.value;
    const offered = talk.transcript.digest;
    const evidence = await talk.receive('EVIDENCE', LIMIT_MS);
    const facts = hostile.attestor.verify(talk.peer, evidence.value, offered);
    if (!offer.value.importKey) throw new Error('no import key');
    const { point, secret } = hostile.attestor.wrap(talk.peer, offer.value.importKey, greeted, facts);
    evidence.accept();
    const answer = offer.value.challenge ? await hostile.attestor.answer(offer.value.challenge) : NOTHING;
    const own = await hostile.attestor.evidence(talk.transcript.digest);
    await talk.send('EVIDENCE', { ...own, challengeAnswer: answer });
    await talk.send('SECRET', { point });
    const shared = sharedSecret(this.#session, offer.value.sessionKey);
    this.keys = new StateKeys(secret, shared, talk.transcript.digest);
    wipe(secret, shared);
  }

  async ready(): Promise<void> {
    const { accept } = await this.talk.receive('READY', LIMIT_MS);
    accept();
  }

  /** As far as READY. */
  async prepare(): Promise<void> {
    await this.greet();
    await this.attest();
    await this.ready();
  }

  /** @returns a serialised StateBundle */
  bundle(changes: Partial<BundleHeader> = {}, parts: StateParts = { PERMANENT: randomBytes(5000) }): Buffer {
    if (!this.keys || !this.offer) throw new Error('nothing is agreed yet');
    const { migrationId, vtpmUuid, vmUuid, epoch, generation, source } = this.hello;
    const auditHead = randomBytes(32);
    const stay = {
      host: source,
      lastEpoch: epoch,
      lastGeneration: generation,
      auditHead,
      auditLength: 9n,
      migrationId,
    };
    const header = {
      ...{
        format: 1,
        migrationId,
        identifier: this.offer.identifier,
        vtpmUuid,
        vmUuid,
        vmRunId: Buffer.alloc(16),
      },
      ...{ epoch, generation, libtpmsVersion: '0.9.2', marks: [], createdAt: 1n, savedAt: 2n },
      ...{ referenceDigest: NOTHING, suspendedGeneration: 0n, lineage: [stay], auditHead, auditLength: 9n },
      ...{ auditTail: [] },
      ...changes,
    };
    return sealBundle(this.keys, header, parts);
  }

  /** @throws ManagerError the destination's refusal @returns the decision's bytes */
  async state(bundle: Uint8Array): Promise<Uint8Array> {
    await this.talk.sendBytes('STATE', bundle);
    const { value } = await this.talk.receive('DECISION', LIMIT_MS);
    return value.decision;
  }
}

const LIMIT_MS = 30_000;
const NOTHING = Buffer.alloc(0);

export function pretended(name: string, id: string, vmUuid: string): Pretended {
  return { name, vtpmUuid: uuidToBytes(id), vmUuid: uuidToBytes(vmUuid) };
}

/** The destination's side of a migration, step by step, for who does not keep to it. */
export class ScriptedDestination {
  readonly talk: Talk;
  readonly #session = boxKeyPair();
  hello: MigrationHello | undefined;

  /** @param first what its session began with */
  constructor(
    private readonly hostile: HostileHost,
    channel: PeerChannel,
    readonly first: PeerMessage,
  ) {
    this.talk = new Talk(channel, 'destination', first);
  }

  async greeted(): Promise<void> {
    const { value, accept } = await this.talk.receive('HELLO', LIMIT_MS);
    accept();
    this.hello = value;
  }

  /** After `greeted`. @param changes of the offer */
  async offer(changes: Partial<MigrationOffer> = {}): Promise<ImportKey> {
    const { talk, hostile, hello } = this;
    const { attestor } = hostile;
    const key = await attestor.makeImportKey(talk.transcript.digest);
    const { publicArea, certifyInfo, certifySignature, pcrSelection } = key;
    const challengeAnswer = hello?.challenge ? await attestor.answer(hello.challenge) : NOTHING;
    await talk.send('OFFER', {
      ...{
        version: 1,
        nonce: randomBytes(32),
        sessionKey: this.#session.publicKey,
        identifier: randomBytes(32),
      },
      importKey: { publicArea, certifyInfo, certifySignature, pcrSelection },
      ...{ libtpmsVersion: '0.9.2', recordFormat: 2, challengeAnswer },
      ...changes,
    });
    const evidence = await attestor.evidence(talk.transcript.digest);
    await talk.send('EVIDENCE', { ...evidence, challengeAnswer: NOTHING });
    return key;
  }

  /** After `offer`. @returns what the source's and this session's secrets make */
  async unwrapped(key: ImportKey): Promise<StateKeys> {
    const { talk, hello } = this;
    (await talk.receive('EVIDENCE', LIMIT_MS)).accept();
    const secret = await talk.receive('SECRET', LIMIT_MS);
    secret.accept();
    const unwrapped = await key.unwrap(secret.value.point);
    return new StateKeys(
      unwrapped,
      sharedSecret(this.#session, hello?.sessionKey ?? NOTHING),
      talk.transcript.digest,
    );
  }

  /** As far as READY. @param spoil the proof */
  async ready(spoil: (proof: Buffer) => Buffer = (proof) => proof): Promise<void> {
    const keys = await this.unwrapped(await this.offer());
    await this.talk.send('READY', { proof: spoil(keys.confirmation(this.talk.transcript.digest)) });
  }

  /** After `ready`. @returns what a decision is about: it travels in the clear within TLS */
  async stateHeader(): Promise<BundleHeader> {
    const bytes = await this.talk.receiveBytes('STATE', LIMIT_MS);
    return decode('BundleHeader', decode('StateBundle', bytes).header);
  }

  /** It is asked what it decided. */
  async answerInquiry(verdict: Verdict): Promise<void> {
    const { value } = await this.talk.receive('INQUIRE', LIMIT_MS);
    const { hostKey } = this.hostile.keys;
    const facts = { ...value, verdict, source: this.talk.peer.hostId, destination: hostKey.publicKey };
    await this.talk.send('DECISION', signDecision(hostKey, facts));
    await this.talk.channel.closed;
  }
}
