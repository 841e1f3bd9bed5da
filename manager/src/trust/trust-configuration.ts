import { createHmac, timingSafeEqual } from 'node:crypto';
import { barrier } from 'vtpm-common';
import {
  type AllowedImage,
  bytesEqual,
  decode,
  encode,
  expectLength,
  ProtoError,
  type TrustConfiguration,
} from 'vtpm-proto';
import { ManagerError } from '../error.js';
import type { KeyHierarchy, RootKeys } from '../keys/index.js';
import type { AnchoredStore } from '../store/anchored-store.js';

export const TRUST_KEY = 'trust';
const TRUST_FORMAT = 1;
/** The whole configuration is one record: more images than this are a mistake, not an installation. */
const MAX_IMAGES = 1024;
/** The names and versions of the packages that an image is made of. */
const MAX_NOTE_LENGTH = 1000;

/** Whom the manager honours: toolstack keys and worker images. Changed through the admin plane only. */
export interface TrustStore {
  /** @param vtpmUuid 16 bytes */
  isToolstackKeyTrusted(publicKey: Uint8Array, vtpmUuid: Uint8Array): boolean;
  isImageAllowed(digest: Uint8Array): boolean;
  images(): readonly AllowedImage[];
  /** Durable and anchored when it resolves. Allowing an image again replaces its note where `note` is given. */
  allowImage(digest: Uint8Array, note: string | undefined, now: bigint): Promise<AllowedImage>;
  /** @returns false where the image was not on the list */
  removeImage(digest: Uint8Array): Promise<boolean>;
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

class StoredTrust implements TrustStore {
  /** Changes run one after the other. */
  #last: Promise<unknown> = Promise.resolve();

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
    await this.#change((images) => {
      const others = images.filter((other) => !bytesEqual(other.digest, digest));
      if (others.length >= MAX_IMAGES) {
        throw new ManagerError(
          'bad-request',
          `there are ${MAX_IMAGES} allowed images; remove old ones first`,
        );
      }
      return [...others, image];
    });
    return image;
  }

  async removeImage(digest: Uint8Array): Promise<boolean> {
    let isRemoved = false;
    await this.#change((images) => {
      const others = images.filter((other) => !bytesEqual(other.digest, digest));
      isRemoved = others.length < images.length;
      return isRemoved ? others : undefined;
    });
    return isRemoved;
  }

  rekey(): Promise<void> {
    return this.#change((images) => [...images]);
  }

  /** In memory the change takes effect only after it is durable and counted. */
  #change(edit: (images: readonly AllowedImage[]) => AllowedImage[] | undefined): Promise<void> {
    const run = this.#last.then(async () => {
      const images = edit(this.configuration.images);
      if (!images) return;
      const next = { ...this.configuration, images };
      const bytes = encodeTrust(this.keys, next);
      barrier('trust.write');
      this.version = await this.store.write(TRUST_KEY, this.version, bytes, 'now');
      barrier('trust.written');
      this.configuration = next;
    });
    this.#last = run.catch(() => undefined);
    return run;
  }
}

/** The record under the current generation of the root key. @throws ManagerError `store-corrupt` */
export function rekeyTrust(keys: KeyHierarchy, bytes: Uint8Array): Buffer {
  return encodeTrust(keys, decodeTrust(keys, bytes));
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
