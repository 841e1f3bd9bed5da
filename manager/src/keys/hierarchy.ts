import { type BoxKeyPair, boxKeyPair, expectLength, type SigningKey, signingKeyFromSeed } from 'vtpm-proto';
import { ManagerError } from '../error.js';
import { anchorAuthOf, type InstallationSecrets } from './keyring.js';
import type { RootKeys } from './root-keys.js';
import { hkdf, wipe } from './secret.js';

export interface SessionNames {
  /** 16 bytes */
  readonly sessionId: Uint8Array;
  /** 16 bytes */
  readonly vtpmUuid: Uint8Array;
  readonly epoch: bigint;
  /** 32 bytes */
  readonly workerKey: Uint8Array;
}

/**
 * Every key of an unlocked manager, in memory only. What is stored names the generation of the root key that protects
 * it: while the root key is rotated there are two, and writes take the newer one.
 */
export class KeyHierarchy {
  /** The manager's identity: Load requests are boxed to it. */
  readonly identity: BoxKeyPair;
  /** Signs backups. It stays over rotations, so that the installation knows its own for ever. */
  readonly backupKey: SigningKey;
  /** This host, for other hosts: signs its identity and what it decides of migrations. It stays over rotations too. */
  readonly hostKey: SigningKey;
  /** Seed of the Ed25519 key of this host's TLS certificate, 32 bytes. It stays over rotations too. */
  readonly peerTlsSeed: Buffer;
  readonly #sessionRoot: Buffer;
  readonly #anchorAuth: Buffer;
  readonly #generations = new Map<number, RootKeys>();
  #current: RootKeys;

  /** Takes over `root`, copies `secrets`. */
  constructor(root: RootKeys, secrets: InstallationSecrets) {
    this.#current = root;
    this.#generations.set(root.keyId, root);
    this.identity = boxKeyPair(secrets.identity);
    const signing = (purpose: string): SigningKey => {
      const seed = hkdf(secrets.identity, root.storeId, purpose);
      try {
        return signingKeyFromSeed(seed);
      } finally {
        wipe(seed);
      }
    };
    this.backupKey = signing('vtpm.v1 backup signature');
    this.hostKey = signing('vtpm.v1 host identity');
    this.peerTlsSeed = hkdf(secrets.identity, root.storeId, 'vtpm.v1 peer tls');
    this.#sessionRoot = hkdf(secrets.session, root.storeId, 'vtpm.v1 session root');
    this.#anchorAuth = anchorAuthOf(secrets, root.storeId);
  }

  /** 16 bytes */
  get storeId(): Buffer {
    return this.#current.storeId;
  }

  /** Protects whatever is written from now on. */
  get current(): RootKeys {
    return this.#current;
  }

  /** The current one first. */
  get generations(): RootKeys[] {
    return [...this.#generations.values()].reverse();
  }

  /** Authorises the anchor's counter in the TPM, 32 bytes. */
  get anchorAuth(): Buffer {
    return this.#anchorAuth;
  }

  /**
   * @param what that is under it, for the message
   * @throws ManagerError `rollback-detected` where that generation was erased, `store-corrupt` where it never was
   */
  ofGeneration(keyId: number, what: string): RootKeys {
    const keys = this.#generations.get(keyId);
    if (keys) return keys;
    if (keyId > 0 && keyId < this.#current.keyId) {
      throw new ManagerError(
        'rollback-detected',
        `${what} is from before the last rotation of the root key (generation ${keyId}, now ${this.#current.keyId}), ` +
          'and nothing opens it any more; put the newest store back',
      );
    }
    throw new ManagerError(
      'store-corrupt',
      `the store is damaged: ${what} names generation ${keyId} of the root key, which there is not; restore it from a backup`,
    );
  }

  /** Key of one session. The same inputs give the same key, so that a restarted manager goes on with it. 32 bytes. */
  sessionKey(session: SessionNames): Buffer {
    return hkdf(this.#sessionRoot, session.sessionId, sessionInfo(session));
  }

  /** Authenticates the references to a vTPM's suspended state, the same for ever. 32 bytes; the caller wipes it. */
  referenceKey(vtpmUuid: Uint8Array): Buffer {
    expectLength('vTPM uuid', vtpmUuid, 16);
    return hkdf(this.#sessionRoot, vtpmUuid, 'vtpm.v1 state reference');
  }

  /** Begins a rotation: both generations open, writes take `next`, which is taken over. */
  advance(next: RootKeys): void {
    this.#generations.set(next.keyId, next);
    this.#current = next;
  }

  /** Ends a rotation: only the current generation is left. */
  forgetOlder(): void {
    for (const [keyId, keys] of this.#generations) {
      if (keys === this.#current) continue;
      keys.wipe();
      this.#generations.delete(keyId);
    }
  }

  wipe(): void {
    for (const keys of this.#generations.values()) keys.wipe();
    wipe(this.#sessionRoot, this.#anchorAuth, this.peerTlsSeed, this.identity.secretKey);
  }
}

/** "vtpm.v1 session", uuid, epoch (u64, big-endian), worker key: every part has a fixed length. */
function sessionInfo({ sessionId, vtpmUuid, epoch, workerKey }: SessionNames): Buffer {
  expectLength('session id', sessionId, 16);
  expectLength('vTPM uuid', vtpmUuid, 16);
  expectLength('worker key', workerKey, 32);
  const number = Buffer.alloc(8);
  number.writeBigUInt64BE(epoch);
  return Buffer.concat([Buffer.from('vtpm.v1 session'), vtpmUuid, number, workerKey]);
}
