import { concat, u32Bytes, wipe } from './bytes.js';
import { encode, tpm2b } from './codec.js';
import type { Command, HandleArguments, HandleNames } from './command.js';
import { Rh, SessionAttribute, St } from './constants.js';
import type { Authorized, Entity } from './entity.js';
import { TpmError } from './error.js';
import { Rc } from './response-code.js';
import type { Session } from './session.js';
import { HEADER } from './transport/transport.js';
import { Reader, Writer } from './wire.js';

/** From a command's values to its bytes, and from the bytes of its answer to its result. */

/** One entry of the authorisation area. */
export interface Use {
  readonly by: Session | 'password';
  /** What it authorises; undefined for a further session. */
  readonly entity: Entity | undefined;
}

const MAX_SESSIONS = 3;
const NO_NONCE = Buffer.alloc(0);

/** The handle area and the authorisation area of a command, in order. */
export function collect<H extends HandleNames, P, R>(
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

/** A command as it is sent. */
export interface Request {
  readonly bytes: Buffer;
  /** Whose session the TPM encrypts the first response parameter with. */
  readonly encrypting: Use | undefined;
}

/** The bytes of a command, for which nonces roll. @throws TpmError `usage`, `poisoned` */
export function build<P>(
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

/**
 * What a command gave.
 * @throws TpmError `tpm` where it was refused; `malformed`, `bad-hmac`
 */
export function parse<R>(
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
