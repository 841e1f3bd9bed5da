import assert from 'node:assert/strict';
import { createHash, randomBytes } from 'node:crypto';
import {
  Alg,
  createPrimary,
  createTpm,
  DictionaryAttackLockReset,
  defineNvIndex,
  GetRandom,
  NV_Increment,
  NV_Read,
  NvAttribute,
  type NvEntity,
  type ObjectEntity,
  openSession,
  PCR_Extend,
  PolicyCommandCode,
  PolicyGetDigest,
  Pt,
  parsePcrSelection,
  permanent,
  ReadClock,
  Rh,
  readNvIndex,
  readPcrs,
  readProperty,
  type Session,
  Sign,
  St,
  signingKeyTemplate,
  type Tpm,
  type Transport,
  withPassword,
  withSession,
} from 'tpm2-ts-bindings';
import { openMixed } from './framed.js';

const COUNTER = 0x01500077;
const PCR = 10;
const NOTHING = Buffer.alloc(0);
const owner = permanent(Rh.OWNER);

/**
 * A guest that knows exactly what its TPM must be at: each of its commands has an effect that shows in the next answer. An
 * effect that is lost, one that comes twice, a session that is not where it was, a TPM that was reset: all are seen at once. Its commands come in
 * frames or without, as it happens.
 */
export class ExactGuest {
  readonly #tpm: Tpm;
  #key: ObjectEntity;
  #hmac: Session;
  #policy: Session;
  readonly #random = new Set<string>();
  readonly #counterIndex: NvEntity;
  #counter: bigint;
  #pcr: Buffer;
  /** The last one that it extended, or was about to. */
  #digest = Buffer.alloc(32);
  #policyDigest: Buffer;
  #clock = 0n;
  #resets: number | undefined;
  /** Commands that were answered. */
  rounds = 0;
  #isStopping = false;
  /** The longest that an answer took, in milliseconds. */
  slowest = 0;

  /** @param door a raw one, or another way */
  static async connect(door: string | Transport): Promise<ExactGuest> {
    const tpm = createTpm(typeof door === 'string' ? await openMixed(door) : door);
    const index = await defineNvIndex(tpm, withPassword(owner), {
      nvIndex: COUNTER,
      attributes: NvAttribute.OWNERWRITE | NvAttribute.OWNERREAD | NvAttribute.COUNTER | NvAttribute.NO_DA,
      dataSize: 8,
    });
    await tpm.run(NV_Increment, { authHandle: withPassword(owner), nvIndex: index }, {});
    const counterIndex = await readNvIndex(tpm, COUNTER);
    assert.ok(counterIndex);
    const guest = new ExactGuest(tpm, { ...(await makeVolatile(tpm)), counterIndex });
    guest.#counter = await guest.#readCounter();
    return guest;
  }

  private constructor(tpm: Tpm, made: Volatile & { counterIndex: NvEntity }) {
    this.#tpm = tpm;
    this.#key = made.key;
    this.#hmac = made.hmac;
    this.#policy = made.policy;
    this.#counterIndex = made.counterIndex;
    this.#pcr = made.pcr;
    this.#policyDigest = Buffer.alloc(32);
    this.#counter = 0n;
  }

  /** Whether its TPM was reset since it last looked. */
  async wasReset(): Promise<boolean> {
    const { currentTime } = await this.#tpm.run(ReadClock, {}, {});
    return currentTime.clockInfo.resetCount + currentTime.clockInfo.restartCount !== this.#resets;
  }

  /**
   * Its machine was switched off and on: what a TPM keeps is there, its primary keys are the same, and what it loses is
   * made anew.
   * @param wasInOrder with a shutdown; otherwise one command may have been run whose answer was lost
   */
  async afterPowerCycle(wasInOrder = true): Promise<void> {
    const { key, hmac, policy, pcr } = await makeVolatile(this.#tpm);
    assert.ok(key.publicArea.bytes.equals(this.#key.publicArea.bytes), 'the primary key is another one');
    const fresh = Buffer.alloc(32);
    // What it was about to extend may have met the new run.
    if (wasInOrder || !pcr.equals(extended(fresh, this.#digest)))
      assert.equal(pcr.toString('hex'), fresh.toString('hex'), 'the PCR after a reset');
    this.#key = key;
    this.#hmac = hmac;
    this.#policy = policy;
    this.#pcr = pcr;
    this.#policyDigest = Buffer.alloc(32);
    const counter = await this.#readCounter();
    if (wasInOrder || counter !== this.#counter + 1n) assert.equal(counter, this.#counter, 'the NV counter');
    this.#counter = counter;
    const before = this.#resets ?? 0;
    this.#resets = undefined;
    // Without a shutdown it goes on from where it was last stored, and says so (Part 1, "Clock").
    if (!wasInOrder) this.#clock = 0n;
    // Nor can it tell that nobody guessed (Part 1, "Dictionary Attack Protection").
    if (!wasInOrder)
      await this.#tpm.run(DictionaryAttackLockReset, { lockHandle: withPassword(permanent(Rh.LOCKOUT)) }, {});
    await this.#readClock();
    const resets = (this.#resets ?? 0) - before;
    assert.ok(wasInOrder ? resets === 1 : resets >= 1, `${resets} resets`);
  }

  /** Rounds until `stop`. @throws AssertionError for what cannot be, TpmError for what must not be answered */
  async run(): Promise<void> {
    while (!this.#isStopping) await this.round();
  }

  stop(): void {
    this.#isStopping = true;
  }

  async round(): Promise<void> {
    await this.#timed(() => this.#extend());
    await this.#timed(() => this.#increment());
    await this.#timed(() => this.#sign());
    await this.#timed(() => this.#takeRandom());
    await this.#timed(() => this.#policyStep());
    await this.#timed(() => this.#readClock());
    this.rounds++;
  }

  /** Nothing was counted as a wrong try. */
  async checkLockout(): Promise<void> {
    assert.equal(await readProperty(this.#tpm, Pt.LOCKOUT_COUNTER), 0, 'the lockout counter moved');
  }

  close(): Promise<void> {
    return this.#tpm.close();
  }

  async #timed(step: () => Promise<void>): Promise<void> {
    const start = performance.now();
    await step();
    this.slowest = Math.max(this.slowest, performance.now() - start);
  }

  async #extend(): Promise<void> {
    const digest = randomBytes(32);
    this.#digest = digest;
    const digests = [{ hashAlg: Alg.SHA256, digest }];
    await this.#tpm.run(PCR_Extend, { pcrHandle: withPassword(permanent(PCR)) }, { digests });
    this.#pcr = extended(this.#pcr, digest);
    const [value] = await readPcrs(this.#tpm, parsePcrSelection(`sha256:${PCR}`));
    assert.equal(value?.toString('hex'), this.#pcr.toString('hex'), 'the PCR');
  }

  /** Each use of the session rolls its nonces: one that is lost or done twice breaks the HMAC. */
  async #increment(): Promise<void> {
    const authHandle = withSession(owner, this.#hmac);
    await this.#tpm.run(NV_Increment, { authHandle, nvIndex: this.#counterIndex }, {});
    this.#counter++;
    assert.equal(await this.#readCounter(), this.#counter, 'the NV counter');
  }

  async #sign(): Promise<void> {
    const digest = randomBytes(32);
    await this.#tpm.run(
      Sign,
      { keyHandle: withSession(this.#key, this.#hmac) },
      {
        digest,
        inScheme: { scheme: Alg.NULL },
        validation: { tag: St.HASHCHECK, hierarchy: Rh.NULL, digest: NOTHING },
      },
    );
  }

  async #takeRandom(): Promise<void> {
    for (const sessions of [[], [this.#hmac]]) {
      const { randomBytes: bytes } = await this.#tpm.run(GetRandom, {}, { bytesRequested: 16 }, sessions);
      const text = bytes.toString('hex');
      assert.ok(!this.#random.has(text), 'a random number came twice');
      this.#random.add(text);
    }
  }

  /** PolicyCommandCode with the same code again: the digest goes on all the same (part 3, section 23.11). */
  async #policyStep(): Promise<void> {
    const code = Buffer.from('0000016c0000015d', 'hex');
    await this.#tpm.run(PolicyCommandCode, { policySession: this.#policy }, { code: 0x15d });
    this.#policyDigest = extended(this.#policyDigest, code);
    const { policyDigest } = await this.#tpm.run(PolicyGetDigest, { policySession: this.#policy }, {});
    assert.equal(policyDigest.toString('hex'), this.#policyDigest.toString('hex'), 'the policy digest');
  }

  async #readClock(): Promise<void> {
    const { currentTime } = await this.#tpm.run(ReadClock, {}, {});
    const { clock, resetCount, restartCount } = currentTime.clockInfo;
    this.#resets ??= resetCount + restartCount;
    assert.equal(resetCount + restartCount, this.#resets, 'the TPM was reset');
    assert.ok(clock >= this.#clock, 'the clock went back');
    this.#clock = clock;
  }

  async #readCounter(): Promise<bigint> {
    const { data } = await this.#tpm.run(
      NV_Read,
      { authHandle: withPassword(owner), nvIndex: this.#counterIndex },
      { size: 8, offset: 0 },
    );
    return data.readBigUInt64BE();
  }
}

function extended(value: Uint8Array, bytes: Uint8Array): Buffer {
  return createHash('sha256').update(value).update(bytes).digest();
}

interface Volatile {
  readonly key: ObjectEntity;
  readonly hmac: Session;
  readonly policy: Session;
  readonly pcr: Buffer;
}

async function makeVolatile(tpm: Tpm): Promise<Volatile> {
  const key = await createPrimary(tpm, signingKeyTemplate(), { authValue: Buffer.from('secret') });
  const hmac = await openSession(tpm, { kind: 'hmac', audit: true });
  const policy = await openSession(tpm, { kind: 'policy' });
  const [pcr] = await readPcrs(tpm, parsePcrSelection(`sha256:${PCR}`));
  assert.ok(pcr);
  return { key, hmac, policy, pcr };
}
