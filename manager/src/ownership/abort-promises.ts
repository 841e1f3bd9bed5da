import { createHmac, timingSafeEqual } from 'node:crypto';
import { bytesEqual, decode, encode, ProtoError } from 'vtpm-proto';
import { ManagerError } from '../error.js';
import type { KeyHierarchy, RootKeys } from '../keys/index.js';
import type { AnchoredStore, Counting } from '../store/anchored-store.js';

const PREFIX = 'aborts/';
const FORMAT = 1;
/** Of one source. The oldest ones go: their source was told, or asks again and is promised the same. */
const MAX_PROMISES = 256;

/** Those of one source, as they are durable or about to be. */
interface PeerPromises {
  version: number;
  /** Migration ids in hex, the oldest first. */
  readonly ids: string[];
  /** Those that are durable and counted. */
  kept: ReadonlySet<string>;
  /** The write under way, or the last one. */
  writing: Promise<void>;
  /** The one after it, which takes everything that comes meanwhile. */
  next: { readonly done: Promise<void>; counting: Counting } | undefined;
}

/**
 * Migrations that come to nothing unless a vTPM's record says that they were committed. A promise is made before the source
 * is told that it may stop anything, so that an ABORT can be said at any time, also with a full disk; and a migration that
 * has one is never begun again.
 */
export class AbortPromises {
  readonly #peers = new Map<string, Promise<PeerPromises>>();

  constructor(private readonly parts: { readonly keys: KeyHierarchy; readonly store: AnchoredStore }) {}

  /** @param source host id */
  async has(source: Uint8Array, migrationId: Uint8Array): Promise<boolean> {
    return (await this.#of(source)).ids.includes(hex(migrationId));
  }

  /** Durable and counted when it resolves. @param isNeeded those of which a commit may still come stay */
  async make(source: Uint8Array, migrationId: Uint8Array, isNeeded: (id: string) => boolean): Promise<void> {
    const promises = await this.#of(source);
    const id = hex(migrationId);
    if (promises.kept.has(id)) return;
    if (!promises.ids.includes(id)) {
      promises.ids.push(id);
      while (promises.ids.length > MAX_PROMISES) {
        const oldest = promises.ids.findIndex((other) => other !== id && !isNeeded(other));
        promises.ids.splice(Math.max(oldest, 0), 1);
      }
    }
    await this.#write(source, promises, 'now');
  }

  /** The source has heard of it. */
  async forget(source: Uint8Array, migrationId: Uint8Array): Promise<void> {
    const promises = await this.#of(source);
    const at = promises.ids.indexOf(hex(migrationId));
    if (at < 0) return;
    promises.ids.splice(at, 1);
    await this.#write(source, promises, 'later');
  }

  /** Puts all under the current generation of the root key. */
  async rekey(): Promise<void> {
    for (let after = PREFIX; ; ) {
      const [key] = this.parts.store.keys(after, 1);
      if (!key?.startsWith(PREFIX)) return;
      const source = Buffer.from(key.slice(PREFIX.length), 'hex');
      await this.#write(source, await this.#of(source), 'later');
      after = key;
    }
  }

  #of(source: Uint8Array): Promise<PeerPromises> {
    const name = hex(source);
    let promises = this.#peers.get(name);
    if (!promises) {
      promises = this.#read(source);
      this.#peers.set(name, promises);
      // What could not be read is read again.
      promises.catch(() => this.#peers.delete(name));
    }
    return promises;
  }

  async #read(source: Uint8Array): Promise<PeerPromises> {
    const entry = await this.parts.store.read(keyOf(source));
    const ids = entry ? decodePromises(this.parts.keys, source, entry.value) : [];
    const version = entry?.version ?? 0;
    return { version, ids, kept: new Set(ids), writing: Promise.resolve(), next: undefined };
  }

  /** One write at a time; what comes while it is under way goes together into the next. */
  #write(source: Uint8Array, promises: PeerPromises, counting: Counting): Promise<void> {
    const { next } = promises;
    if (next) {
      if (counting === 'now') next.counting = 'now';
      return next.done;
    }
    const done = promises.writing
      .catch(() => undefined)
      .then(async () => {
        const isCounted = promises.next?.counting === 'now';
        promises.writing = done;
        promises.next = undefined;
        const ids = [...promises.ids];
        const bytes = encodePromises(this.parts.keys, source, ids);
        const { version } = promises;
        promises.version = await this.parts.store.write(
          keyOf(source),
          version,
          bytes,
          isCounted ? 'now' : 'later',
        );
        promises.kept = new Set(isCounted ? ids : ids.filter((id) => promises.kept.has(id)));
      });
    promises.next = { done, counting };
    return done;
  }
}

/** Whether a key of the store is one of these. */
export function isPromisesKey(key: string): boolean {
  return key.startsWith(PREFIX);
}

/**
 * The record under the current generation of the root key.
 * @param isKept of the source's host id and the migration id, in hex
 * @throws ManagerError `store-corrupt`
 */
export function keepPromises(
  keys: KeyHierarchy,
  key: string,
  bytes: Uint8Array,
  isKept: (source: string, id: string) => boolean,
): Buffer {
  const name = key.slice(PREFIX.length);
  const source = Buffer.from(name, 'hex');
  const ids = decodePromises(keys, source, bytes).filter((id) => isKept(name, id));
  return encodePromises(keys, source, ids);
}

function keyOf(source: Uint8Array): string {
  return PREFIX + hex(source);
}

function encodePromises(keys: KeyHierarchy, source: Uint8Array, ids: readonly string[]): Buffer {
  const promises = encode('AbortPromises', {
    format: FORMAT,
    source,
    migrationIds: ids.map((id) => Buffer.from(id, 'hex')),
  });
  const { keyId } = keys.current;
  return encode('AbortRecord', { promises, mac: macOf(keys.current, promises), keyId });
}

function decodePromises(keys: KeyHierarchy, source: Uint8Array, bytes: Uint8Array): string[] {
  try {
    const { promises, mac, keyId } = decode('AbortRecord', bytes);
    const expected = macOf(keys.ofGeneration(keyId, 'a record of migrations that were refused'), promises);
    if (mac.length !== expected.length || !timingSafeEqual(mac, expected))
      throw corrupt('does not authenticate');
    const { format, source: of, migrationIds } = decode('AbortPromises', promises);
    if (format > FORMAT) {
      throw new ManagerError(
        'newer-format',
        `a record of migrations that were refused has format ${format}, this version knows ${FORMAT}; run the version that wrote it`,
      );
    }
    if (!bytesEqual(of, source)) throw corrupt('is that of another host');
    return migrationIds.map(hex);
  } catch (error) {
    if (!(error instanceof ProtoError)) throw error;
    throw corrupt('is not readable');
  }
}

function macOf(keys: RootKeys, promises: Uint8Array): Buffer {
  return createHmac('sha256', keys.recordMacKey).update('vtpm.v1 aborts\0').update(promises).digest();
}

function hex(bytes: Uint8Array): string {
  return Buffer.from(bytes).toString('hex');
}

function corrupt(what: string): ManagerError {
  return new ManagerError(
    'store-corrupt',
    `the record of migrations that were refused ${what}; restore the store from a backup`,
  );
}
