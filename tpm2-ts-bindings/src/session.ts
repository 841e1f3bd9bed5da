import { timingSafeEqual } from 'node:crypto';
import { concat, trimTrailingZeros, u32Bytes, wipe } from './bytes.js';
import type { PolicyEffect } from './command.js';
import { FlushContext, StartAuthSession } from './commands/index.js';
import { Alg, type HashInfo, Rh, Se } from './constants.js';
import { cfb, digest, encapsulate, hmac, kdfa, random, requireHash } from './crypto.js';
import { type Entity, type ObjectEntity, permanent } from './entity.js';
import { TpmError } from './error.js';
import type { Tpm } from './tpm.js';

/** Which first parameters a session encrypts: those to the TPM (`in`), those from it (`out`), or both. */
export type Encryption = 'in' | 'out' | 'both';

/**
 * `salt`: a storage key of the TPM that only it can decrypt with. Check its Name against a trusted one first: whoever
 * sits on the bus can offer a key of his own. `bind`: an entity whose authValue enters the session key.
 * Without either the session key is empty and encryption would hide nothing from who sees the nonces: such options do
 * not type-check.
 */
export type SessionOptions = {
  readonly kind: 'hmac' | 'policy' | 'trial';
  /** Session hash, Alg.SHA256 unless given. */
  readonly authHash?: number;
} & (
  | { readonly encrypt?: never; readonly salt?: ObjectEntity; readonly bind?: Entity }
  | { readonly encrypt: Encryption; readonly salt: ObjectEntity; readonly bind?: Entity }
  | { readonly encrypt: Encryption; readonly salt?: ObjectEntity; readonly bind: Entity }
);

const SESSION_TYPE = { hmac: Se.HMAC, policy: Se.POLICY, trial: Se.TRIAL } as const;
const NOTHING = Buffer.alloc(0);

/** Opens a session. Close it: a TPM without a resource manager has three or so. */
export async function openSession(tpm: Tpm, options: SessionOptions): Promise<Session> {
  const { salt, bind } = options;
  // The type cannot say it of an empty authValue: binding to that adds nothing either.
  if (options.encrypt !== undefined && salt === undefined && !bind?.authValue.length) {
    throw new TpmError('usage', 'a session that encrypts needs a salt, or a bind entity with an authValue');
  }
  const hash = requireHash(options.authHash ?? Alg.SHA256);
  const nonceCaller = random(hash.size);
  const salted = salt === undefined ? undefined : encapsulate(salt.publicArea.value, 'SECRET');
  const seed = concat(bind?.authValue ?? NOTHING, salted?.secret ?? NOTHING);
  try {
    const started = await tpm.run(
      StartAuthSession,
      { tpmKey: salt ?? permanent(Rh.NULL), bind: bind ?? permanent(Rh.NULL) },
      {
        nonceCaller,
        encryptedSalt: salted?.encrypted ?? NOTHING,
        sessionType: SESSION_TYPE[options.kind],
        symmetric:
          options.encrypt === undefined
            ? { algorithm: Alg.NULL }
            : { algorithm: Alg.AES, keyBits: 128, mode: Alg.CFB },
        authHash: hash.alg,
      },
    );
    // Part 1, section 19: no key where there is neither salt nor bind.
    const key =
      salt === undefined && bind === undefined
        ? NOTHING
        : kdfa(hash, seed, 'ATH', started.nonceTPM, nonceCaller, hash.size * 8);
    return new Session(tpm, started.sessionHandle, hash, key, options, nonceCaller, started.nonceTPM);
  } finally {
    wipe(seed, salted?.secret);
  }
}

/** Runs `body` with a session that is closed afterwards, whatever happens. */
export async function inSession<T>(
  tpm: Tpm,
  options: SessionOptions,
  body: (session: Session) => Promise<T>,
): Promise<T> {
  const session = await openSession(tpm, options);
  try {
    return await body(session);
  } finally {
    await session.close();
  }
}

/** A session in the TPM. Made by `openSession`; the methods below `close` are for the command pipeline. */
export class Session implements Entity {
  readonly name: Buffer;
  readonly authValue = NOTHING;
  readonly kind: SessionOptions['kind'];
  #state: 'open' | 'poisoned' | 'closed' = 'open';
  /** What a use proves besides the policy itself. */
  #proves: 'nothing' | 'auth-value' | 'password' = 'nothing';
  #boundTo: Entity | undefined;

  constructor(
    private readonly tpm: Tpm,
    readonly handle: number,
    readonly hash: HashInfo,
    private readonly key: Buffer,
    private readonly options: SessionOptions,
    private nonceCaller: Buffer,
    private tpmNonce: Buffer,
  ) {
    this.name = u32Bytes(handle);
    this.kind = options.kind;
    this.#boundTo = options.bind;
  }

  /**
   * Wipes the key and removes the session from the TPM. Never rejects: where the TPM does not answer or knows the
   * session no more, nothing is left to do.
   */
  async close(): Promise<void> {
    if (this.#state === 'closed') return;
    this.#state = 'closed';
    wipe(this.key);
    await this.tpm.run(FlushContext, {}, { flushHandle: this.handle }).catch((error: unknown) => {
      if (!(error instanceof TpmError)) throw error;
    });
  }

  get nonceTpm(): Buffer {
    return this.tpmNonce;
  }

  get encryptsIn(): boolean {
    return this.options.encrypt === 'in' || this.options.encrypt === 'both';
  }

  get encryptsOut(): boolean {
    return this.options.encrypt === 'out' || this.options.encrypt === 'both';
  }

  /** A new nonce for the next command. @throws TpmError `poisoned` or `usage` where the session is of no use */
  begin(command: string): Buffer {
    if (this.#state === 'poisoned') {
      throw new TpmError('poisoned', `TPM2_${command}: the session saw a failure before; open a new one`);
    }
    if (this.#state === 'closed') throw new TpmError('usage', `TPM2_${command}: the session is closed`);
    if (this.kind === 'trial') throw new TpmError('usage', 'a trial session authorises nothing');
    this.nonceCaller = random(this.hash.size);
    return this.nonceCaller;
  }

  /** Nothing more is authorised with it: both sides may disagree on nonces, or someone sits between them. */
  poison(): void {
    if (this.#state === 'open') this.#state = 'poisoned';
  }

  /** For a command that it audits. The TPM takes the binding away then (Part 1, section 19). @throws TpmError `usage` */
  audit(): void {
    if (this.kind !== 'hmac')
      throw new TpmError('usage', 'a policy session has nothing to do in this command');
    this.#boundTo = undefined;
  }

  /** Takes what PolicyAuthValue, PolicyPassword and PolicyRestart do (`command.policyEffect`). The last one counts. */
  policyEffect(effect: PolicyEffect): void {
    this.#proves = effect === 'restart' ? 'nothing' : effect;
  }

  /** The HMAC of a command (Part 1, section 19). `extraNonces`: of other sessions that encrypt, for the first session. */
  commandHmac(
    entity: Entity | undefined,
    cpHash: Buffer,
    attributes: number,
    extraNonces: readonly Buffer[],
  ): Buffer {
    // The authValue itself is in the place of the HMAC (Part 3, 23.18: PolicyPassword).
    if (this.#proves === 'password') return concat(entity?.authValue ?? NOTHING);
    return this.#hmac(entity, entity?.authValue, [
      cpHash,
      this.nonceCaller,
      this.tpmNonce,
      ...extraNonces,
      Buffer.of(attributes),
    ]);
  }

  /**
   * Checks the HMAC of a response and takes its nonce.
   * @param newAuth the authValue of `entity` where the command has changed it
   * @throws TpmError `bad-hmac`
   */
  acceptResponse(
    entity: Entity | undefined,
    rpHash: Buffer,
    nonceTpm: Buffer,
    attributes: number,
    received: Buffer,
    newAuth?: Uint8Array,
  ): void {
    // Nothing proves an answer to a password, in any session (Part 3, 23.18: PolicyPassword).
    const isPassword = this.#proves === 'password';
    const authValue = newAuth === undefined ? entity?.authValue : trimTrailingZeros(newAuth);
    const expected = isPassword
      ? NOTHING
      : this.#hmac(entity, authValue, [rpHash, nonceTpm, this.nonceCaller, Buffer.of(attributes)]);
    if (expected.length !== received.length || !timingSafeEqual(expected, received)) {
      throw new TpmError('bad-hmac', 'the answer is not from this TPM or was changed on its way');
    }
    this.tpmNonce = nonceTpm;
    // A policy session starts anew with each use (Part 1, section 19: policyDigest is reset with the nonce).
    this.#proves = 'nothing';
  }

  /** Encrypts a first parameter to the TPM. */
  encrypt(entity: Entity | undefined, data: Uint8Array): Buffer {
    return this.#crypt('encrypt', entity, this.nonceCaller, this.tpmNonce, data);
  }

  /** Decrypts a first parameter from the TPM, after `acceptResponse`. */
  decrypt(entity: Entity | undefined, data: Uint8Array): Buffer {
    return this.#crypt('decrypt', entity, this.tpmNonce, this.nonceCaller, data);
  }

  /** Hash over the parameters of a command or response with what is in front of them. */
  parameterHash(...parts: readonly Uint8Array[]): Buffer {
    return digest(this.hash, ...parts);
  }

  // Part 1, section 21: the authValue enters the encryption key of every session that authorises, bound, policy or not.
  #crypt(
    direction: 'encrypt' | 'decrypt',
    entity: Entity | undefined,
    newer: Buffer,
    older: Buffer,
    data: Uint8Array,
  ): Buffer {
    const sessionValue = concat(this.key, entity?.authValue ?? NOTHING);
    const keyAndIv = kdfa(this.hash, sessionValue, 'CFB', newer, older, 256);
    try {
      return cfb(direction, keyAndIv.subarray(0, 16), keyAndIv.subarray(16), data);
    } finally {
      wipe(sessionValue, keyAndIv);
    }
  }

  // Whether an authValue enters is decided with the entity as it was when the command was sent.
  #hmac(entity: Entity | undefined, authValue: Uint8Array | undefined, parts: readonly Uint8Array[]): Buffer {
    const auth = entity !== undefined && this.#usesAuthValue(entity) ? (authValue ?? NOTHING) : NOTHING;
    const key = concat(this.key, auth);
    try {
      // With nothing to prove, a policy session carries an empty HMAC both ways (Part 1, section 19).
      if (key.length === 0 && this.kind === 'policy') return NOTHING;
      return hmac(this.hash, key, ...parts);
    } finally {
      wipe(key);
    }
  }

  #usesAuthValue(entity: Entity): boolean {
    if (this.kind === 'policy') return this.#proves === 'auth-value';
    const bind = this.#boundTo;
    const bound =
      bind?.name !== undefined &&
      entity.name?.equals(bind.name) === true &&
      Buffer.compare(entity.authValue, bind.authValue) === 0;
    return !bound;
  }
}
