import { createHmac, timingSafeEqual } from 'node:crypto';
import { barrier } from 'vtpm-common';
import {
  type AllowedImage,
  bytesEqual,
  decode,
  encode,
  expectLength,
  type Peer,
  ProtoError,
  type TrustConfiguration,
} from 'vtpm-proto';
import { ManagerError } from '../error.js';
import type { KeyHierarchy, RootKeys } from '../keys/index.js';
import type { AnchoredStore } from '../store/anchored-store.js';
import { checkNewPeer, checkPeer, unknownPeer } from './peers.js';

export const TRUST_KEY = 'trust';
const TRUST_FORMAT = 1;
/** The whole configuration is one record: more images than this are a mistake, not an installation. */
const MAX_IMAGES = 1024;
/** The names and versions of the packages that an image is made of. */
const MAX_NOTE_LENGTH = 1000;

/** Whom the manager honours: toolstack keys, worker images, other hosts. Changed through the admin plane only. */
export interface TrustStore {
  /** @param vtpmUuid 16 bytes */
  isToolstackKeyTrusted(publicKey: Uint8Array, vtpmUuid: Uint8Array): boolean;
  isImageAllowed(digest: Uint8Array): boolean;
  images(): readonly AllowedImage[];
  /** Durable and anchored when it resolves. Allowing an image again replaces its note where `note` is given. */
  allowImage(digest: Uint8Array, note: string | undefined, now: bigint): Promise<AllowedImage>;
  /** @returns false where the image was not on the list */
  removeImage(digest: Uint8Array): Promise<boolean>;
  /** In the order in which they were added. */
  peers(): readonly Peer[];
  peerNamed(name: string): Peer | undefined;
  /** @param tlsKey of its certificate, 32 bytes */
  peerOf(tlsKey: Uint8Array): Peer | undefined;
  /** @param hostId 32 bytes */
  peerById(hostId: Uint8Array): Peer | undefined;
  /**
   * Durable and anchored when it resolves, as the two below.
   * @throws ManagerError `peer-exists` where one has its name, host id, TLS key or EK; `bad-request`
   */
  addPeer(peer: Peer): Promise<void>;
  /** @param edit may throw; of what there is at that moment @throws ManagerError `unknown-peer`, `bad-request` */
  changePeer(name: string, edit: (peer: Peer) => Peer): Promise<Peer>;
  /** @throws ManagerError `unknown-peer` */
  removePeer(name: string): Promise<Peer>;
  /** Told of each peer that is not any more what it was, after that is so. @returns ends it */
  onPeersChanged(listener: () => void): () => void;
  /** This host's attestation key as its TPM gave it out. */
  attestationKey(): Uint8Array | undefined;
  /** Made once. @param make asked where there is none; one at a time */
  ensureAttestationKey(make: () => Promise<Uint8Array>): Promise<Uint8Array>;
  /** Puts the record under the current generation of the root key. */
  rekey(): Promise<void>;
}

/** Writes the first configuration: one toolstack key for every vTPM, no image. Used by init alone. */
export async function createTrustStore(
  keys: KeyHierarchy,
  store: AnchoredStore,
  toolstackKey: Uint8Array,
  now: bigint,
): Promise<void> {
  expectLength('toolstack key', toolstackKey, 32);
  const configuration: TrustConfiguration = {
    format: TRUST_FORMAT,
    storeId: keys.storeId,
    toolstackKeys: [{ publicKey: toolstackKey, vtpmScope: [], addedAt: now }],
    images: [],
    peers: [],
    attestationKey: new Uint8Array(0),
  };
  await store.write(TRUST_KEY, 0, encodeTrust(keys, configuration), 'now');
}

/** @throws ManagerError `store-corrupt` where the record is missing or was changed, `newer-format` */
export async function openTrustStore(keys: KeyHierarchy, store: AnchoredStore): Promise<TrustStore> {
  const entry = await store.read(TRUST_KEY);
  if (!entry) {
    throw new ManagerError(
      'store-corrupt',
      'the store has no trust configuration; restore the store from a backup',
    );
  }
  return new StoredTrust(keys, store, decodeTrust(keys, entry.value), entry.version);
}

type Changes = Partial<Pick<TrustConfiguration, 'images' | 'peers' | 'attestationKey'>>;

class StoredTrust implements TrustStore {
  /** Changes run one after the other. */
  #last: Promise<unknown> = Promise.resolve();
  readonly #onPeersChanged = new Set<() => void>();

  constructor(
    private readonly keys: KeyHierarchy,
    private readonly store: AnchoredStore,
    private configuration: TrustConfiguration,
    private version: number,
  ) {}

  isToolstackKeyTrusted(publicKey: Uint8Array, vtpmUuid: Uint8Array): boolean {
    return this.configuration.toolstackKeys.some(
      (key) =>
        bytesEqual(key.publicKey, publicKey) &&
        (key.vtpmScope.length === 0 || key.vtpmScope.some((uuid) => bytesEqual(uuid, vtpmUuid))),
    );
  }

  isImageAllowed(digest: Uint8Array): boolean {
    return this.configuration.images.some((image) => bytesEqual(image.digest, digest));
  }

  images(): readonly AllowedImage[] {
    return this.configuration.images;
  }

  async allowImage(digest: Uint8Array, note: string | undefined, now: bigint): Promise<AllowedImage> {
    if (digest.length !== 32) throw new ManagerError('bad-request', 'an image digest is 64 hex digits');
    if (note !== undefined && note.length > MAX_NOTE_LENGTH) {
      throw new ManagerError('bad-request', `a note has at most ${MAX_NOTE_LENGTH} characters`);
    }
    const old = this.configuration.images.find((other) => bytesEqual(other.digest, digest));
    const image: AllowedImage = {
      digest: Buffer.from(digest),
      note: note ?? old?.note ?? '',
      allowedAt: now,
    };
    await this.#change(({ images }) => {
      const others = images.filter((other) => !bytesEqual(other.digest, digest));
      if (others.length >= MAX_IMAGES) {
        throw new ManagerError(
          'bad-request',
          `there are ${MAX_IMAGES} allowed images; remove old ones first`,
        );
      }
      return { images: [...others, image] };
    });
    return image;
  }

  async removeImage(digest: Uint8Array): Promise<boolean> {
    let isRemoved = false;
    await this.#change(({ images }) => {
      const others = images.filter((other) => !bytesEqual(other.digest, digest));
      isRemoved = others.length < images.length;
      return isRemoved ? { images: others } : undefined;
    });
    return isRemoved;
  }

  peers(): readonly Peer[] {
    return this.configuration.peers;
  }

  peerNamed(name: string): Peer | undefined {
    return this.peers().find((peer) => peer.name === name);
  }

  peerOf(tlsKey: Uint8Array): Peer | undefined {
    return this.peers().find((peer) => bytesEqual(peer.tlsKey, tlsKey));
  }

  peerById(hostId: Uint8Array): Peer | undefined {
    return this.peers().find((peer) => bytesEqual(peer.hostId, hostId));
  }

  async addPeer(peer: Peer): Promise<void> {
    checkPeer(peer);
    if (bytesEqual(peer.hostId, this.keys.hostKey.publicKey)) {
      throw new ManagerError('bad-request', 'this is the identity of this host; add it on the other one');
    }
    await this.#change(({ peers }) => {
      checkNewPeer(peers, peer);
      return { peers: [...peers, peer] };
    });
  }

  async changePeer(name: string, edit: (peer: Peer) => Peer): Promise<Peer> {
    let changed: Peer | undefined;
    await this.#change(({ peers }) => {
      const old = peers.find((peer) => peer.name === name);
      if (!old) throw unknownPeer(name);
      // Who it is stays: another host is another peer.
      const { hostId, tlsKey, backupKey, endorsementKey, attestationKey, addedAt } = old;
      const who = { name, hostId, tlsKey, backupKey, endorsementKey, attestationKey, addedAt };
      const next = { ...edit(old), ...who };
      checkPeer(next);
      changed = next;
      return { peers: peers.map((peer) => (peer === old ? next : peer)) };
    });
    return changed as Peer;
  }

  async removePeer(name: string): Promise<Peer> {
    const removed: Peer[] = [];
    await this.#change(({ peers }) => {
      removed.push(...peers.filter((peer) => peer.name === name));
      if (removed.length === 0) throw unknownPeer(name);
      return { peers: peers.filter((peer) => peer.name !== name) };
    });
    return removed[0] as Peer;
  }

  onPeersChanged(listener: () => void): () => void {
    this.#onPeersChanged.add(listener);
    return () => this.#onPeersChanged.delete(listener);
  }

  attestationKey(): Uint8Array | undefined {
    const { attestationKey } = this.configuration;
    return attestationKey.length === 0 ? undefined : attestationKey;
  }

  async ensureAttestationKey(make: () => Promise<Uint8Array>): Promise<Uint8Array> {
    await this.#change(async ({ attestationKey }) =>
      attestationKey.length === 0 ? { attestationKey: await make() } : undefined,
    );
    return this.configuration.attestationKey;
  }

  rekey(): Promise<void> {
    return this.#change(() => ({}));
  }

  /**
   * In memory the change takes effect only after it is durable and counted.
   * @param edit what is another; undefined where nothing is
   */
  #change(
    edit: (now: TrustConfiguration) => Changes | undefined | Promise<Changes | undefined>,
  ): Promise<void> {
    const run = this.#last.then(async () => {
      const changes = await edit(this.configuration);
      if (!changes) return;
      const next = { ...this.configuration, ...changes };
      const bytes = encodeTrust(this.keys, next);
      barrier('trust.write');
      this.version = await this.store.write(TRUST_KEY, this.version, bytes, 'now');
      barrier('trust.written');
      this.configuration = next;
      if (changes.peers) for (const listener of this.#onPeersChanged) listener();
    });
    this.#last = run.catch(() => undefined);
    return run;
  }
}

/**
 * The record under the current generation of the root key.
 * @param isOtherTpm it cannot load the attestation key: a new one is made when it is needed
 * @throws ManagerError `store-corrupt`
 */
export function rekeyTrust(keys: KeyHierarchy, bytes: Uint8Array, isOtherTpm: boolean): Buffer {
  const configuration = decodeTrust(keys, bytes);
  return encodeTrust(
    keys,
    isOtherTpm ? { ...configuration, attestationKey: new Uint8Array(0) } : configuration,
  );
}

function encodeTrust(keys: KeyHierarchy, value: TrustConfiguration): Buffer {
  const configuration = encode('TrustConfiguration', value);
  const { keyId } = keys.current;
  return encode('TrustRecord', { configuration, mac: trustMac(keys.current, configuration), keyId });
}

function decodeTrust(keys: KeyHierarchy, bytes: Uint8Array): TrustConfiguration {
  try {
    const record = decode('TrustRecord', bytes);
    const expected = trustMac(
      keys.ofGeneration(record.keyId, 'the trust configuration'),
      record.configuration,
    );
    if (record.mac.length !== expected.length || !timingSafeEqual(record.mac, expected)) {
      throw corrupt('does not authenticate');
    }
    const configuration = decode('TrustConfiguration', record.configuration);
    if (configuration.format > TRUST_FORMAT) {
      throw new ManagerError(
        'newer-format',
        `the trust configuration has format ${configuration.format}, this version knows ${TRUST_FORMAT}; run the version that wrote it`,
      );
    }
    if (!bytesEqual(configuration.storeId, keys.storeId)) throw corrupt('is of another store');
    return configuration;
  } catch (error) {
    if (error instanceof ProtoError) throw corrupt('is not readable');
    throw error;
  }
}

function trustMac(keys: RootKeys, configuration: Uint8Array): Buffer {
  return createHmac('sha256', keys.trustMacKey).update('vtpm.v1 trust\0').update(configuration).digest();
}

function corrupt(what: string): ManagerError {
  return new ManagerError(
    'store-corrupt',
    `the trust configuration ${what}; restore the store from a backup`,
  );
}
