import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import {
  attestationKeyTemplate,
  ContextLoad,
  ContextSave,
  CreatePrimary,
  createTpm,
  EvictControl,
  flush,
  GetRandom,
  Load,
  type ObjectEntity,
  objectEntity,
  openSession,
  openSocket,
  type PublicArea,
  readRandom,
  type Session,
  type SessionOptions,
  StartAuthSession,
  srkTemplate,
  type Tpm,
  TpmError,
  Unseal,
  withPassword,
  withSession,
} from 'tpm2-ts-bindings';
import { isA } from '../support/is-a.js';
import { commandCode, type RecordingProxy, startRecordingProxy } from '../support/recording-proxy.js';
import { type Swtpm, startSwtpm } from '../support/swtpm.js';
import { assertNothingLeaked, connectTpm, withPrimary } from '../support/tpm-fixture.js';
import { AUTH, createSealedPrimary, dataTemplate, makeSubjects, type Subject } from './flip-subjects.js';
import { create, has, OWNER, withChild } from './make.js';

/** A TPM behind a bus on which one bit of one answer flips. */

/** Header with its size; the size has tests of its own, because a socket acts on it. */
const SIZE_AT = 2;
const HEADER = 10;

interface Armed {
  readonly code: number;
  /** Where to flip, given the answer. */
  at(answer: Buffer): number;
  readonly bit: number;
}

export class FlipBench {
  #swtpm!: Swtpm;
  #bus!: RecordingProxy;
  #armed: Armed | undefined;
  /** The answer that was changed, as it was. */
  #original: Buffer | undefined;
  tpm!: Tpm;
  srk!: ObjectEntity;
  sealed!: ObjectEntity;
  #subjects: readonly Subject[] = [];
  readonly data = randomBytes(32);

  async start(): Promise<void> {
    this.#swtpm = await startSwtpm();
    this.#bus = await startRecordingProxy(this.#swtpm.socket, {
      response: (answer, command) => this.#change(answer, command),
    });
    this.tpm = await connectTpm(this.#bus.path);
    // Persistent, because a TPM has few places for others.
    this.srk = await withPrimary(this.tpm, srkTemplate(), (key) => this.#persist(key, 0x81000001), AUTH);
    this.sealed = await this.#makeChild(dataTemplate(false), this.data, 0x81000002);
    const byPolicy = await this.#makeChild(dataTemplate(true), this.data, 0x81000003);
    const signer = await withPrimary(
      this.tpm,
      attestationKeyTemplate(),
      (key) => this.#persist(key, 0x81000004),
      AUTH,
    );
    this.#subjects = await makeSubjects(this, byPolicy, signer);
  }

  async stop(): Promise<void> {
    await assertNothingLeaked(this.tpm);
    await this.tpm.close();
    await this.#bus.close();
    await this.#swtpm.stop();
  }

  #change(answer: Buffer, command: Buffer): Buffer {
    const armed = this.#armed;
    if (armed === undefined || commandCode(command) !== armed.code) return answer;
    this.#armed = undefined;
    this.#original = Buffer.from(answer);
    const at = armed.at(answer);
    answer[at] = (answer[at] ?? 0) ^ (1 << armed.bit);
    return answer;
  }

  /** Runs `body` with that bit flipped in the first answer to `code`. */
  async #withFlip<T>(armed: Armed, body: () => Promise<T>): Promise<{ result: T; original: Buffer }> {
    this.#armed = armed;
    this.#original = undefined;
    const result = await body();
    assert.ok(this.#original !== undefined, 'no bit was flipped');
    return { result, original: this.#original };
  }

  async #persist(key: ObjectEntity, handle: number): Promise<ObjectEntity> {
    await this.tpm.run(
      EvictControl,
      { auth: withPassword(OWNER), objectHandle: key },
      { persistentHandle: handle },
    );
    return { ...key, handle };
  }

  async #makeChild(template: PublicArea, data: Buffer, handle: number): Promise<ObjectEntity> {
    const child = await create(this.tpm, this.srk, template, { auth: AUTH, data });
    return withChild(this.tpm, this.srk, child, (key) => this.#persist(key, handle), AUTH);
  }

  #subject(name: string): Subject {
    const found = this.#subjects.find((subject) => subject.name === name);
    assert.ok(found, name);
    return found;
  }

  get names(): string[] {
    return this.#subjects.map(({ name }) => name);
  }

  /** How many bytes of an answer its HMAC or its format has to cover. */
  async protectedBytes(name: string): Promise<number> {
    const subject = this.#subject(name);
    const session = await openSession(this.tpm, subject.session);
    const { original } = await this.#withFlip({ code: subject.code, at: () => 0, bit: 0 }, () =>
      subject.run(session).catch(() => undefined),
    );
    await session.close();
    await this.#flushMade(subject, original);
    return original.length - 4 - 4 * subject.handles;
  }

  /** Asserts that the answer is refused with that bit flipped, and that its session is of no use any more. */
  async assertRefused(name: string, index: number, bit: number): Promise<void> {
    const subject = this.#subject(name);
    const session = await openSession(this.tpm, subject.session);
    const { result, original } = await this.#withFlip(
      { code: subject.code, at: (answer) => protectedByte(subject, answer, index), bit },
      () =>
        subject.run(session).then(
          () => undefined,
          (error: unknown) => error,
        ),
    );
    const where = `${subject.name}: bit ${bit} of byte ${protectedByte(subject, original, index)}`;
    assert.ok(isA(result, TpmError), `${where} was accepted, or: ${result}`);
    assert.ok(['bad-hmac', 'malformed'].includes(result.code), `${where}: ${result.code}`);
    await assert.rejects(readRandom(this.tpm, 4, [session]), has('poisoned'), where);
    await session.close();
    await this.#flushMade(subject, original);
  }

  async #flushMade(subject: Subject, original: Buffer): Promise<void> {
    if (subject.handles > 0) await flush(this.tpm, original.readUInt32BE(HEADER));
  }

  /** A flipped bit of the size: the socket's client waits for more, or finds too much. */
  async assertSizeRefused(bit: number): Promise<void> {
    const session = await openSession(this.tpm, { kind: 'hmac', encrypt: 'out', salt: this.srk });
    await this.tpm.close();
    // Short, because a larger size is waited for; the one command on this connection fails in any case.
    const hasty = createTpm(await openSocket(this.#bus.path, { deadline: 100 }));
    const { result } = await this.#withFlip(
      { code: GetRandom.code, at: () => SIZE_AT + (bit >>> 3), bit: bit & 7 },
      () =>
        readRandom(hasty, 16, [session]).then(
          () => undefined,
          (error: unknown) => error,
        ),
    );
    assert.ok(isA(result, TpmError) && ['transport', 'malformed'].includes(result.code), `${bit}: ${result}`);
    await hasty.close();
    this.tpm = await connectTpm(this.#bus.path);
    await flush(this.tpm, session.handle);
  }

  /**
   * Asserts that an object whose handle came with that bit flipped cannot be used, and no other in its place, though
   * another with the same authValue is loaded.
   */
  async assertHandleUseless(from: 'CreatePrimary' | 'Load' | 'ContextLoad', bit: number): Promise<void> {
    const { tpm } = this;
    // With other data: the same would make the same object, Name and all.
    const decoy = await this.#withSession((session) => createSealedPrimary(tpm, session, randomBytes(32)));
    const code = { CreatePrimary, Load, ContextLoad }[from].code;
    const at = (): number => HEADER + (bit >>> 3);
    const { result, original } = await this.#withFlip({ code, at, bit: bit & 7 }, () => this.#bring(from));
    try {
      assert.notEqual(result.handle, original.readUInt32BE(HEADER));
      await this.#withSession((session) =>
        assert.rejects(
          tpm.run(Unseal, { itemHandle: withSession(result, session) }, {}),
          has('tpm'),
          `${from} ${bit}`,
        ),
      );
      // With the handle that it has, it can be used.
      const right = { ...result, handle: original.readUInt32BE(HEADER) };
      const { outData } = await this.#withSession((session) =>
        tpm.run(Unseal, { itemHandle: withSession(right, session) }, {}),
      );
      assert.deepEqual(outData, this.data);
    } finally {
      await flush(tpm, original.readUInt32BE(HEADER));
      await flush(tpm, decoy.objectHandle);
    }
  }

  async #bring(from: 'CreatePrimary' | 'Load' | 'ContextLoad'): Promise<ObjectEntity> {
    const { tpm, srk } = this;
    if (from === 'CreatePrimary') {
      const made = await this.#withSession((session) => createSealedPrimary(tpm, session, this.data));
      return objectEntity(made.objectHandle, made.outPublic, AUTH);
    }
    const child = await create(tpm, srk, dataTemplate(false), { auth: AUTH, data: this.data });
    const load = (session: Session) =>
      tpm.run(
        Load,
        { parentHandle: withSession(srk, session) },
        { inPrivate: child.outPrivate, inPublic: child.outPublic },
      );
    const { objectHandle } = await this.#withSession(load);
    const loaded = objectEntity(objectHandle, child.outPublic, AUTH);
    if (from === 'Load') return loaded;
    const { context } = await tpm.run(ContextSave, { saveHandle: loaded }, {});
    await flush(tpm, loaded.handle);
    return { ...loaded, handle: (await tpm.run(ContextLoad, {}, { context })).loadedHandle };
  }

  async #withSession<T>(body: (session: Session) => Promise<T>): Promise<T> {
    const session = await openSession(this.tpm, { kind: 'hmac', salt: this.srk });
    try {
      return await body(session);
    } finally {
      await session.close();
    }
  }

  /** Asserts that a session whose answer came with that bit flipped does not open, or fails with its first use. */
  async assertSessionUseless(options: SessionOptions, index: number, bit: number): Promise<void> {
    const { tpm } = this;
    const decoy = await openSession(tpm, options);
    const { result, original } = await this.#withFlip(
      { code: StartAuthSession.code, at: (answer) => skipSize(index % (answer.length - 4)), bit },
      () => openSession(tpm, options).catch((error: unknown) => error as Error),
    );
    try {
      const where = `bit ${bit} of byte ${skipSize(index % (original.length - 4))}`;
      if (result instanceof Error) {
        assert.ok(isA(result, TpmError) && result.code === 'malformed', `${where}: ${result}`);
      } else {
        const itemHandle = withSession(this.sealed, result);
        await assert.rejects(tpm.run(Unseal, { itemHandle }, {}), has('tpm'), where);
      }
    } finally {
      await flush(tpm, original.readUInt32BE(HEADER));
      await decoy.close();
    }
  }
}

/** Positions without those of the size. */
function skipSize(index: number): number {
  return index < SIZE_AT ? index : index + 4;
}

function protectedByte(subject: Subject, answer: Buffer, index: number): number {
  const at = skipSize(index % (answer.length - 4 - 4 * subject.handles));
  return at < HEADER ? at : at + 4 * subject.handles;
}
