import { concat, u32Bytes, wipe } from './bytes.js';
import { encode, tpm2b } from './codec.js';
import type { Command, HandleArguments, HandleNames } from './command.js';
import { Rh, SessionAttribute, St } from './constants.js';
import type { Authorized, Entity } from './entity.js';
import { TpmError } from './error.js';
import { Rc } from './response-code.js';
import { Session } from './session.js';
import { abortable } from './transport/abort.js';
import { type RetryOptions, retrying } from './transport/retry.js';
import { abortedError, HEADER, type Transport, throwIfAborted } from './transport/transport.js';
import { Reader, Writer } from './wire.js';

export interface RunOptions {
  /**
   * Gives the command up. One that waits is dropped with `aborted`: neither the TPM nor a session noticed it. One under way
   * is cancelled where the transport can ask for it, and then ends as the TPM says: with TPM_RC_CANCELED, or as if nothing
   * had been asked (TPMs may stop only key generation). Otherwise the wait ends with `transport`, for this command and all
   * after it.
   */
  readonly signal?: AbortSignal;
}

/** A TPM. Commands are executed one after the other in the order they were asked for. */
export interface Tpm {
  /**
   * Executes a command.
   * @param handles one entry per handle of the command, those that need it with an authorisation
   * @param sessions further sessions, which only encrypt or authenticate; three in all
   * @throws TpmError
   */
  run<H extends HandleNames, P, R>(
    command: Command<H, P, R>,
    handles: HandleArguments<H>,
    params: P,
    sessions?: readonly Session[],
    options?: RunOptions,
  ): Promise<R>;
  /** Waits for the commands under way, then closes the transport. */
  close(): Promise<void>;
}

/** A client on a transport, which it owns from now on. */
export function createTpm(transport: Transport, retry: RetryOptions = {}): Tpm {
  return new QueuedTpm(retrying(abortable(transport), retry));
}

/** One entry of the authorisation area. */
interface Use {
  readonly by: Session | 'password';
  /** What it authorises; undefined for a further session. */
  readonly entity: Entity | undefined;
}

const MAX_SESSIONS = 3;
const NO_NONCE = Buffer.alloc(0);

class QueuedTpm implements Tpm {
  #last: Promise<unknown> = Promise.resolve();
  constructor(private readonly transport: Transport) {}

  run<H extends HandleNames, P, R>(
    command: Command<H, P, R>,
    handles: HandleArguments<H>,
    params: P,
    sessions: readonly Session[] = [],
    { signal }: RunOptions = {},
  ): Promise<R> {
    let hasBegun = false;
    // Nonces roll with each command, so a command is built only when its turn has come.
    const turn = this.#last.then(() => {
      throwIfAborted(signal);
      hasBegun = true;
      return this.#execute(command, handles, params, sessions, signal);
    });
    // Without the result, which may be a secret that the caller wipes and forgets.
    this.#last = turn.then(
      () => undefined,
      () => undefined,
    );
    if (signal === undefined) return turn;
    // Who gives up a command that waits is not kept until its turn.
    return new Promise((resolve, reject) => {
      const onAbort = (): void => {
        if (!hasBegun) reject(abortedError(signal));
      };
      if (signal.aborted) onAbort();
      signal.addEventListener('abort', onAbort, { once: true });
      turn.finally(() => signal.removeEventListener('abort', onAbort)).then(resolve, reject);
    });
  }

  async close(): Promise<void> {
    await this.#last;
    await this.transport.close();
  }

  async #execute<H extends HandleNames, P, R>(
    command: Command<H, P, R>,
    handles: HandleArguments<H>,
    params: P,
    extra: readonly Session[],
    signal: AbortSignal | undefined,
  ): Promise<R> {
    const { entities, uses } = collect(command, handles, extra);
    const used = uses.flatMap((use) => (use.by === 'password' ? [] : [use.by]));
    const request = build(command, entities, uses, params);
    let response: Buffer | undefined;
    try {
      try {
        response = await this.transport.transmit(request.bytes, signal);
      } finally {
        wipe(request.bytes);
      }
      const newAuth = command.newAuth(params, entities[0]);
      const result = parse(command, uses, request, response, newAuth);
      for (const entity of entities) {
        if (entity instanceof Session && command.policyEffect !== undefined)
          entity.policyEffect(command.policyEffect);
      }
      return result;
    } catch (error) {
      // A command that the TPM refused or did not get leaves its sessions as they were; after any other error the two
      // sides may disagree.
      const isInStep = error instanceof TpmError && (error.code === 'tpm' || error.code === 'aborted');
      if (!isInStep) for (const session of used) session.poison();
      throw error;
    } finally {
      wipe(response);
    }
  }
}

/** The handle area and the authorisation area of a command, in order. */
function collect<H extends HandleNames, P, R>(
  command: Command<H, P, R>,
  handles: HandleArguments<H>,
  extra: readonly Session[],
): { entities: Entity[]; uses: Use[] } {
  const uses: Use[] = [];
  const given = handles as Readonly<Record<string, Entity | Authorized>>;
  const entities = command.handles.map((name) => {
    const value = given[name.replace('!', '')];
    if (value === undefined) throw new TpmError('usage', `TPM2_${command.name}: ${name} is missing`);
    if (!('by' in value)) return value;
    uses.push({ by: value.by, entity: value.entity });
    return value.entity;
  });
  for (const session of extra) uses.push({ by: session, entity: undefined });
  if (uses.length > MAX_SESSIONS) {
    throw new TpmError('usage', `TPM2_${command.name}: more than ${MAX_SESSIONS} sessions`);
  }
  const sessions = uses.filter((use) => use.by !== 'password').map((use) => use.by);
  if (new Set(sessions).size !== sessions.length) {
    throw new TpmError('usage', `TPM2_${command.name}: the same session twice`);
  }
  return { entities, uses };
}

interface Request {
  readonly bytes: Buffer;
  /** Whose session the TPM encrypts the first response parameter with. */
  readonly encrypting: Use | undefined;
}

function build<P>(
  command: Command<HandleNames, P, unknown>,
  entities: readonly Entity[],
  uses: readonly Use[],
  params: P,
): Request {
  const own = uses.map((use) => (use.by === 'password' ? NO_NONCE : use.by.begin(command.name)));
  const find = (wanted: (session: Session) => boolean): Use | undefined =>
    uses.find((use) => use.by !== 'password' && wanted(use.by));
  const decrypting = command.encryptable.in ? find((session) => session.encryptsIn) : undefined;
  const encrypting = command.encryptable.out ? find((session) => session.encryptsOut) : undefined;

  const authorisation = new Writer();
  const out = new Writer();
  let plain: Buffer | undefined;
  try {
    plain = encode(command.params, params);
    const parameters = decrypting === undefined ? plain : encryptFirst(decrypting, plain);
    for (const [at, use] of uses.entries()) {
      const attributes = attributesOf(use, decrypting, encrypting);
      const nonces = at === 0 ? others(uses, decrypting, encrypting) : [];
      const proof = prove(command, entities, use, parameters, attributes, nonces);
      authorisation.unsigned(use.by === 'password' ? Rh.PASSWORD : use.by.handle, 4);
      tpm2b.write(authorisation, own[at] ?? NO_NONCE);
      authorisation.unsigned(attributes, 1);
      tpm2b.write(authorisation, proof);
      wipe(proof);
    }
    out.unsigned(uses.length > 0 ? St.SESSIONS : St.NO_SESSIONS, 2);
    const sizes = 4 * entities.length + (uses.length > 0 ? 4 + authorisation.length : 0);
    out.unsigned(HEADER + sizes + parameters.length, 4);
    out.unsigned(command.code, 4);
    for (const { handle } of entities) out.unsigned(handle, 4);
    if (uses.length > 0) {
      out.unsigned(authorisation.length, 4);
      out.bytes(authorisation.written);
    }
    out.bytes(parameters);
    return { bytes: out.finish(), encrypting };
  } finally {
    wipe(plain);
    authorisation.wipe();
    out.wipe();
  }
}

function attributesOf(use: Use, decrypting: Use | undefined, encrypting: Use | undefined): number {
  if (use.by === 'password') return SessionAttribute.continueSession;
  const crypts =
    (use === decrypting ? SessionAttribute.decrypt : 0) | (use === encrypting ? SessionAttribute.encrypt : 0);
  return use.by.attributes(crypts, use.entity !== undefined);
}

/** The password itself, or the HMAC over command code, Names and parameters (Part 1, "Session-Based Authorizations"). */
function prove(
  command: Command<HandleNames, unknown, unknown>,
  entities: readonly Entity[],
  use: Use,
  parameters: Buffer,
  attributes: number,
  extraNonces: readonly Buffer[],
): Buffer {
  if (use.by === 'password') return concat(use.entity?.authValue ?? NO_NONCE);
  const names = entities.map((entity) => {
    if (entity.name === undefined) {
      throw new TpmError('usage', `TPM2_${command.name}: the Name of a handle is not known`);
    }
    return entity.name;
  });
  const cpHash = use.by.parameterHash(u32Bytes(command.code), ...names, parameters);
  return use.by.commandHmac(use.entity, cpHash, attributes, extraNonces);
}

/**
 * The nonceTPM of encrypting sessions other than the first, which the first one's HMAC covers so that none of them can
 * be taken away: decrypt, then encrypt, once if they are the same. Only a first session that authorises covers them
 * (Part 1, "Session-Based Authorizations").
 */
function others(uses: readonly Use[], decrypting: Use | undefined, encrypting: Use | undefined): Buffer[] {
  const first = uses[0];
  if (first?.entity === undefined) return [];
  return [...new Set([decrypting, encrypting])].flatMap((use) =>
    use === undefined || use === first || use.by === 'password' ? [] : [use.by.nonceTpm],
  );
}

function encryptFirst(use: Use, parameters: Buffer): Buffer {
  if (use.by === 'password') return parameters;
  const size = 2 + parameters.readUInt16BE();
  const encrypted = use.by.encrypt(use.entity, parameters.subarray(2, size));
  return concat(parameters.subarray(0, 2), encrypted, parameters.subarray(size));
}

function parse<R>(
  command: Command<HandleNames, unknown, R>,
  uses: readonly Use[],
  request: Request,
  response: Buffer,
  newAuth: Uint8Array | undefined,
): R {
  const what = `answer to TPM2_${command.name}`;
  const reader = new Reader(response, what);
  const tag = reader.unsigned(2);
  const size = reader.unsigned(4);
  const rc = reader.unsigned(4);
  if (size !== response.length) {
    throw new TpmError('malformed', `${what}: ${response.length} bytes, ${size} announced`);
  }
  if (rc !== Rc.SUCCESS) {
    // Anything longer is another answer whose code was changed: its command was executed, and nonces have rolled.
    if (response.length !== HEADER || (tag !== St.NO_SESSIONS && tag !== St.RSP_COMMAND)) {
      throw new TpmError('malformed', `${what}: an error with tag 0x${tag.toString(16)} and ${size} bytes`);
    }
    throw TpmError.fromResponse(command.name, rc);
  }
  if (tag !== (uses.length > 0 ? St.SESSIONS : St.NO_SESSIONS)) {
    throw new TpmError('malformed', `${what}: tag 0x${tag.toString(16)}`);
  }
  const handles = command.resultHandles.map((name) => [name, reader.unsigned(4)] as const);
  const parameters = reader.bytes(uses.length > 0 ? reader.unsigned(4) : reader.left);
  let plain: Buffer | undefined;
  try {
    if (uses.length > 0) acceptSessions(command.code, uses, parameters, reader, newAuth);
    reader.end();
    plain =
      request.encrypting === undefined ? parameters : decryptFirst(request.encrypting, parameters, what);
    const inner = new Reader(plain, what);
    const result = command.result.read(inner);
    inner.end();
    return { ...Object.fromEntries(handles), ...(result as object) } as R;
  } finally {
    wipe(parameters, plain);
  }
}

/** Every session's HMAC is checked before anything of the answer is used. */
function acceptSessions(
  code: number,
  uses: readonly Use[],
  parameters: Buffer,
  reader: Reader,
  newAuth: Uint8Array | undefined,
): void {
  for (const [at, { by, entity }] of uses.entries()) {
    const nonceTpm = reader.bytes(reader.unsigned(2));
    const attributes = reader.unsigned(1);
    const proof = reader.bytes(reader.unsigned(2));
    if (by === 'password') {
      if (nonceTpm.length + proof.length > 0 || attributes !== SessionAttribute.continueSession)
        throw new TpmError(
          'malformed',
          'a password has no nonce, no HMAC and no attribute but continueSession',
        );
      continue;
    }
    const rpHash = by.parameterHash(u32Bytes(Rc.SUCCESS), u32Bytes(code), parameters);
    by.acceptResponse(entity, rpHash, nonceTpm, attributes, proof, at === 0 ? newAuth : undefined);
  }
}

function decryptFirst(use: Use, parameters: Buffer, what: string): Buffer {
  if (use.by === 'password') return parameters;
  const size = parameters.length < 2 ? 0 : 2 + parameters.readUInt16BE();
  if (size < 2 || size > parameters.length) {
    throw new TpmError('malformed', `${what}: the encrypted parameter is too short`);
  }
  const decrypted = use.by.decrypt(use.entity, parameters.subarray(2, size));
  try {
    return concat(parameters.subarray(0, 2), decrypted, parameters.subarray(size));
  } finally {
    wipe(decrypted);
  }
}
