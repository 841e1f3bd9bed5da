import assert from 'node:assert/strict';
import { createHash, createHmac } from 'node:crypto';
import fc from 'fast-check';
import {
  Alg,
  createTpm,
  encode,
  type HandleArguments,
  type HandleNames,
  hashInfo,
  objectEntity,
  permanent,
  Session,
  St,
  srkTemplate,
  type Tpm,
  TpmError,
  type Transport,
  withPassword,
} from 'tpm2-ts-bindings';
import { isA } from '../support/is-a.js';
import { type AnyCommand, COMMANDS, fieldsOf, MUTATION } from './arbitrary.js';

/** What a fuzzed TPM answers, and what may come of it. */

const SESSION_KEY = Buffer.alloc(32, 7);
const NONCE_TPM = Buffer.alloc(32, 9);
/** What stands for a password in an answer: no nonce, continueSession, no HMAC. */
const PASSWORD_AREA = Buffer.from('0000010000', 'hex');

export interface Case {
  readonly command: AnyCommand;
  readonly params: unknown;
  /** Also with a session whose HMAC is right: so the bytes get to where they are decrypted. */
  readonly inSession: boolean;
  /** Given the command, the whole answer. */
  answer(sent: Buffer): Buffer;
}

const needsSessions = (command: AnyCommand): boolean => command.handles.some((name) => name.startsWith('!'));

/** An answer that reports success. `body` is what comes after the header. */
function withHeader(tag: number, ...body: readonly Buffer[]): Buffer {
  const out = Buffer.concat([Buffer.alloc(10), ...body]);
  out.writeUInt16BE(tag);
  out.writeUInt32BE(out.length, 2);
  return out;
}

/** Header, handles, parameters and what proves them, for a command with passwords or without any session. */
function plainAnswer(command: AnyCommand, handles: Buffer, parameters: Buffer): Buffer {
  if (!needsSessions(command)) return withHeader(St.NO_SESSIONS, handles, parameters);
  return withHeader(St.SESSIONS, handles, sizeOf(parameters), parameters, passwords(command));
}

function passwords(command: AnyCommand): Buffer {
  return Buffer.concat(command.handles.filter((name) => name.startsWith('!')).map(() => PASSWORD_AREA));
}

function sizeOf(bytes: Buffer): Buffer {
  const out = Buffer.alloc(4);
  out.writeUInt32BE(bytes.length);
  return out;
}

/** As a TPM that shares SESSION_KEY makes it (Part 1, section 19). */
function sessionAnswer(command: AnyCommand, sent: Buffer, handles: Buffer, parameters: Buffer): Buffer {
  const { nonce, attributes } = lastSession(sent, command.handles.length);
  const code = Buffer.alloc(8);
  code.writeUInt32BE(command.code, 4);
  const proof = createHmac('sha256', SESSION_KEY)
    .update(createHash('sha256').update(code).update(parameters).digest())
    .update(NONCE_TPM)
    .update(nonce)
    .update(Buffer.of(attributes))
    .digest();
  const size = Buffer.from([0, 32]);
  const area = Buffer.concat([passwords(command), size, NONCE_TPM, Buffer.of(attributes), size, proof]);
  return withHeader(St.SESSIONS, handles, sizeOf(parameters), parameters, area);
}

function lastSession(sent: Buffer, handles: number): { nonce: Buffer; attributes: number } {
  let at = 10 + 4 * handles;
  const end = at + 4 + sent.readUInt32BE(at);
  at += 4;
  for (;;) {
    const nonceSize = sent.readUInt16BE(at + 4);
    const nonce = sent.subarray(at + 6, at + 6 + nonceSize);
    const attributes = sent.readUInt8(at + 6 + nonceSize);
    at += 9 + nonceSize + sent.readUInt16BE(at + 7 + nonceSize);
    if (at >= end) return { nonce, attributes };
  }
}

/** @param recorded answers of a real TPM to change, by command code */
export function cases(recorded: ReadonlyMap<number, readonly Buffer[]>): fc.Arbitrary<Case> {
  return fc.constantFrom(...COMMANDS).chain((command) => {
    const result = fieldsOf(command, 'result').map((value) => encode(command.result, value));
    const handles = fc
      .uint8Array({
        minLength: 4 * command.resultHandles.length,
        maxLength: 4 * command.resultHandles.length,
      })
      .map((bytes) => Buffer.from(bytes));
    const made = fc.tuple(handles, result).map(([some, bytes]) => plainAnswer(command, some, bytes));
    const real = recorded.get(command.code) ?? [];
    const valid = real.length === 0 ? made : fc.oneof(fc.constantFrom(...real), made);
    const params = fieldsOf(command, 'params');
    const plain = (bytes: fc.Arbitrary<Buffer>): fc.Arbitrary<Case> =>
      fc.tuple(params, bytes).map(([value, answer]) => ({
        command,
        params: value,
        inSession: false,
        answer: () => Buffer.from(answer),
      }));
    const proved = fc.tuple(params, handles, result, MUTATION).map(([value, some, bytes, mutate]) => ({
      command,
      params: value,
      inSession: true,
      answer: (sent: Buffer) => sessionAnswer(command, sent, some, mutate(bytes)),
    }));
    return fc.oneof(
      { weight: 1, arbitrary: plain(fc.uint8Array({ maxLength: 120 }).map((bytes) => Buffer.from(bytes))) },
      { weight: 2, arbitrary: plain(fc.tuple(valid, MUTATION).map(([bytes, mutate]) => mutate(bytes))) },
      // With the size in the header right again, what is wrong gets further in.
      {
        weight: 5,
        arbitrary: plain(fc.tuple(valid, MUTATION).map(([bytes, mutate]) => resized(mutate(bytes)))),
      },
      { weight: 3, arbitrary: proved },
    );
  });
}

function resized(bytes: Buffer): Buffer {
  if (bytes.length >= 6) bytes.writeUInt32BE(bytes.length, 2);
  return bytes;
}

/** Runs one case: a value, or an error with a name that blames the answer; and no more memory than it is worth. */
export async function judge({
  command,
  params,
  inSession,
  answer,
}: Case): Promise<'value' | TpmError['code']> {
  let meter: Meter | undefined;
  let size = 0;
  const transport: Transport = {
    async transmit(sent) {
      const bytes = answer(Buffer.from(sent));
      size = bytes.length;
      meter = new Meter();
      return bytes;
    },
    close: async () => undefined,
  };
  // An answer that says RETRY is not asked for again.
  const tpm = createTpm(transport, { total: 0 });
  const entity = permanent(0x40000001);
  const handles = Object.fromEntries(
    command.handles.map((name) => [
      name.replace('!', ''),
      name.startsWith('!') ? withPassword(entity) : entity,
    ]),
  ) as object as HandleArguments<HandleNames>;
  let outcome: 'value' | TpmError['code'] = 'value';
  try {
    const value = await tpm.run(command, handles, params, inSession ? [fuzzSession(tpm)] : []);
    assert.equal(typeof value, 'object');
  } catch (error) {
    if (!isA(error, TpmError)) throw error;
    outcome = error.code;
  } finally {
    meter?.stop();
  }
  assert.ok(meter !== undefined, `nothing was sent: ${outcome}`);
  assert.ok(['value', 'tpm', 'malformed'].includes(outcome), `${command.name}: ${outcome}`);
  // 64: keys, nonces and the like, whose size no answer says.
  assert.ok(meter.largest <= size + 64, `${meter.largest} bytes at once for an answer of ${size}`);
  assert.ok(meter.total <= 8 * size + 2048, `${meter.total} bytes in all for an answer of ${size}`);
  return outcome;
}

function fuzzSession(tpm: Tpm): Session {
  const hash = hashInfo(Alg.SHA256);
  assert.ok(hash);
  // Its constructor is internal: only here is a key given that no TPM agreed to.
  const Made = Session as unknown as new (...parts: unknown[]) => Session;
  return new Made(
    tpm,
    0x02000000,
    hash,
    Buffer.from(SESSION_KEY),
    { kind: 'hmac', encrypt: 'both', salt: objectEntity(0x80000000, srkTemplate()) },
    Buffer.alloc(32),
    Buffer.alloc(32),
  );
}

/** What is asked for of memory, in bytes and list elements, until `stop`. */
class Meter {
  largest = 0;
  total = 0;
  readonly #alloc = Buffer.alloc;
  readonly #from = Array.from;

  constructor() {
    Buffer.alloc = ((size: number, ...rest: []) => {
      this.#count(size);
      return this.#alloc.call(Buffer, size, ...rest);
    }) as typeof Buffer.alloc;
    Array.from = ((source: ArrayLike<unknown>, map: (value: unknown, at: number) => unknown) => {
      this.#count(source.length ?? 0);
      return this.#from.call(Array, source, map);
    }) as typeof Array.from;
  }

  stop(): void {
    Buffer.alloc = this.#alloc;
    Array.from = this.#from;
  }

  #count(size: number): void {
    this.largest = Math.max(this.largest, size);
    this.total += size;
  }
}
