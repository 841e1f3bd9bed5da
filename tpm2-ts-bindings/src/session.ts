import { timingSafeEqual } from 'node:crypto';
import { AuditDigest } from './audit.js';
import { concat, trimTrailingZeros, u32Bytes, wipe } from './bytes.js';
import { flush } from './client.js';
import type { PolicyEffect } from './command.js';
import { type HashInfo, SessionAttribute } from './constants.js';
import { cfb, digest, hmac, kdfa, random } from './crypto.js';
import type { Entity, ObjectEntity } from './entity.js';
import { TpmError } from './error.js';
import type { Tpm } from './tpm.js';

/** Which first parameters a session encrypts: those to the TPM (`in`), those from it (`out`), or both. */
export type Encryption = 'in' | 'out' | 'both';

/**
 * `salt`: a storage key of the TPM that only it can decrypt with. Check its Name against a trusted one first: whoever
 * sits on the bus can offer a key of his own. `bind`: an entity whose authValue enters the session key.
 * Without either the session key is empty and encryption would hide nothing from who sees the nonces: such options do
 * not type-check.
 *
 * `audit`, for an HMAC session: the TPM folds each command that it is used in, with its answer, into a digest (Part 1,
 * "Audit") and signs that with GetSessionAuditDigest; `Session.auditDigest` is the same, computed here. `exclusive`: the
 * TPM refuses with TPM_RC_EXCLUSIVE what comes after a command without the session; `Session.resetAudit` begins anew.
 */
export type SessionOptions = {
  readonly kind: 'hmac' | 'policy' | 'trial';
  /** Session hash, Alg.SHA256 unless given. */
  readonly authHash?: number;
  /** The TPM forgets the session with the first command that it is used in and that succeeds. */
  readonly once?: boolean;
} & (
  | { readonly encrypt?: never; readonly salt?: ObjectEntity; readonly bind?: Entity }
  | { readonly encrypt: Encryption; readonly salt: ObjectEntity; readonly bind?: Entity }
  | { readonly encrypt: Encryption; readonly salt?: ObjectEntity; readonly bind: Entity }
) &
  ({ readonly audit?: never } | { readonly kind: 'hmac'; readonly audit?: true | 'exclusive' });

const NOTHING = Buffer.alloc(0);

/** A session in the TPM, made by `openSession`. What is internal is for the command pipeline. */
export class Session implements Entity {
  readonly name: Buffer;
  readonly authValue = NOTHING;
  readonly kind: SessionOptions['kind'];
  /** `ended`: the TPM has forgotten it with its one command. */
  #state: 'open' | 'poisoned' | 'ended' | 'closed' = 'open';
  /** What a use proves besides the policy itself. */
  #proves: 'nothing' | 'auth-value' | 'password' = 'nothing';
  #boundTo: Entity | undefined;
  #audit: AuditDigest | undefined;
  #isExclusive = false;
  #endsWithNext = false;
  #resetsAudit = false;
  /** Of the command under way. */
  #sent: { readonly cpHash: Buffer; readonly attributes: number } = { cpHash: NOTHING, attributes: 0 };

  /** @internal */
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

  /** The next command is its last one: where that succeeds, the TPM removes the session with the answer. */
  endWithNext(): void {
    this.#endsWithNext = true;
  }

  /**
   * Wipes the key and removes the session from the TPM. Never rejects: where the TPM does not answer or knows the
   * session no more, nothing is left to do.
   */
  async close(): Promise<void> {
    if (this.#state === 'closed') return;
    const isGone = this.#state === 'ended';
    this.#state = 'closed';
    try {
      if (!isGone) await flush(this.tpm, this.handle);
    } finally {
      // Not before: the answer to a command that is under way still has to be checked.
      wipe(this.key);
    }
  }

  /** What the TPM's audit digest is if all is well. undefined before the first command that the session audits. */
  get auditDigest(): Buffer | undefined {
    return this.#audit?.value;
  }

  /** True where the TPM said last that it ran nothing outside this audit since that began. */
  get isExclusive(): boolean {
    return this.#isExclusive;
  }

  /** The next command begins a new audit, exclusive again. @throws TpmError `usage` where the session does not audit */
  resetAudit(): void {
    if (this.options.audit === undefined) throw new TpmError('usage', 'the session was not opened to audit');
    this.#resetsAudit = true;
  }

  /** The TPM's last nonce: what a `signed` policy step signs holds it. */
  get nonceTpm(): Buffer {
    return this.tpmNonce;
  }

  /** @internal */
  get encryptsIn(): boolean {
    return this.options.encrypt === 'in' || this.options.encrypt === 'both';
  }

  /** @internal */
  get encryptsOut(): boolean {
    return this.options.encrypt === 'out' || this.options.encrypt === 'both';
  }

  /**
   * A new nonce for the next command.
   * @internal
   * @throws TpmError `poisoned` or `usage` where the session is of no use
   */
  begin(command: string): Buffer {
    if (this.#state === 'poisoned') {
      throw new TpmError('poisoned', `TPM2_${command}: the session saw a failure before; open a new one`);
    }
    if (this.#state !== 'open') throw new TpmError('usage', `TPM2_${command}: the session is closed`);
    if (this.kind === 'trial') throw new TpmError('usage', 'a trial session authorises nothing');
    this.nonceCaller = random(this.hash.size);
    return this.nonceCaller;
  }

  /**
   * Nothing more is authorised with it: both sides may disagree on nonces, or someone sits between them.
   * @internal
   */
  poison(): void {
    if (this.#state === 'open') this.#state = 'poisoned';
  }

  /**
   * Attributes for the next command (TPMA_SESSION, Part 2). A session that neither authorises nor encrypts has to audit
   * (otherwise TPM_RC_ATTRIBUTES): then its HMAC still proves the answer.
   * @param crypts `decrypt` and `encrypt` of `SessionAttribute`, as the session does that in the command
   * @throws TpmError `usage` where the session has nothing to do in it
   * @internal
   */
  attributes(crypts: number, authorises: boolean): number {
    if (!authorises && this.#proves === 'password') {
      throw new TpmError(
        'usage',
        'after PolicyPassword a session can only authorise: no HMAC would prove more',
      );
    }
    const isLast = this.options.once === true || this.#endsWithNext;
    const attributes = (isLast ? 0 : SessionAttribute.continueSession) | crypts;
    if (this.options.audit === undefined && (authorises || crypts !== 0)) return attributes;
    if (this.kind !== 'hmac')
      throw new TpmError('usage', 'a policy session cannot audit, and this command has no other use for it');
    return (
      attributes |
      SessionAttribute.audit |
      (this.options.audit === 'exclusive' ? SessionAttribute.auditExclusive : 0) |
      (this.#resetsAudit ? SessionAttribute.auditReset : 0)
    );
  }

  /**
   * Takes what PolicyAuthValue, PolicyPassword and PolicyRestart do (`command.policyEffect`). The last one counts.
   * @internal
   */
  policyEffect(effect: PolicyEffect): void {
    this.#proves = effect === 'restart' ? 'nothing' : effect;
  }

  /**
   * The HMAC of a command (Part 1, "Session-Based Authorizations"). `extraNonces`: of other sessions that encrypt, for
   * the first session.
   * @internal
   */
  commandHmac(
    entity: Entity | undefined,
    cpHash: Buffer,
    attributes: number,
    extraNonces: readonly Buffer[],
  ): Buffer {
    this.#sent = { cpHash, attributes };
    // The authValue itself is in the place of the HMAC (Part 3, PolicyPassword).
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
   * Checks the HMAC, nonce and attributes of a response and takes them.
   * @param newAuth the authValue of `entity` where the command has changed it
   * @throws TpmError `bad-hmac`, or `malformed` where it is not the answer to what was sent
   * @internal
   */
  acceptResponse(
    entity: Entity | undefined,
    rpHash: Buffer,
    nonceTpm: Buffer,
    attributes: number,
    received: Buffer,
    newAuth?: Uint8Array,
  ): void {
    // Nothing proves an answer to a password, in any session (Part 3, PolicyPassword).
    const isPassword = this.#proves === 'password';
    const authValue = newAuth === undefined ? entity?.authValue : trimTrailingZeros(newAuth);
    const expected = isPassword
      ? NOTHING
      : this.#hmac(entity, authValue, [rpHash, nonceTpm, this.nonceCaller, Buffer.of(attributes)]);
    if (expected.length !== received.length || !timingSafeEqual(expected, received)) {
      throw new TpmError('bad-hmac', 'the answer is not from this TPM or was changed on its way');
    }
    if (nonceTpm.length !== this.tpmNonce.length || !fits(attributes, this.#sent.attributes)) {
      throw new TpmError(
        'malformed',
        'the answer has a nonce or session attributes that its command excludes',
      );
    }
    this.tpmNonce = nonceTpm;
    if ((attributes & SessionAttribute.audit) !== 0) this.#extendAudit(rpHash, attributes);
    if ((attributes & SessionAttribute.continueSession) === 0 && this.#state === 'open')
      this.#state = 'ended';
    // A policy session starts anew with each use (its policyDigest is reset with the nonce).
    this.#proves = 'nothing';
  }

  #extendAudit(rpHash: Buffer, attributes: number): void {
    // The TPM takes the binding away with the first command it audits, once that has succeeded.
    this.#boundTo = undefined;
    const isReset = (this.#sent.attributes & SessionAttribute.auditReset) !== 0;
    if (isReset) this.#resetsAudit = false;
    if (isReset || this.#audit === undefined) this.#audit = new AuditDigest(this.hash.alg);
    this.#audit.extend(this.#sent.cpHash, rpHash);
    this.#isExclusive = (attributes & SessionAttribute.auditExclusive) !== 0;
  }

  /**
   * Encrypts a first parameter to the TPM.
   * @internal
   */
  encrypt(entity: Entity | undefined, data: Uint8Array): Buffer {
    return this.#crypt('encrypt', entity, this.nonceCaller, this.tpmNonce, data);
  }

  /**
   * Decrypts a first parameter from the TPM, after `acceptResponse`.
   * @internal
   */
  decrypt(entity: Entity | undefined, data: Uint8Array): Buffer {
    return this.#crypt('decrypt', entity, this.tpmNonce, this.nonceCaller, data);
  }

  /**
   * Hash over the parameters of a command or response with what is in front of them.
   * @internal
   */
  parameterHash(...parts: readonly Uint8Array[]): Buffer {
    return digest(this.hash, ...parts);
  }

  // Part 1, "Session-Based Encryption": the authValue enters the encryption key of every session that authorises,
  // bound, policy or not.
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
      // With nothing to prove, a policy session carries an empty HMAC both ways.
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

/**
 * True where a response may have these attributes: those of the command, but for what the TPM says of an audit. It
 * says whether that is exclusive, which it has to be where the command asks for it, and may clear auditReset (Part 2,
 * TPMA_SESSION).
 */
function fits(received: number, sent: number): boolean {
  const { audit, auditExclusive, auditReset } = SessionAttribute;
  const free = (sent & audit) === 0 ? 0 : auditReset | ((sent & auditExclusive) ^ auditExclusive);
  return ((received ^ sent) & ~free) === 0 && (received & auditReset & ~sent) === 0;
}
