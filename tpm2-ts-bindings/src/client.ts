import { concat, wipe } from './bytes.js';
import { embed } from './codec.js';
import {
  FlushContext,
  GetCapability,
  GetRandom,
  NV_DefineSpace,
  NV_ReadPublic,
  ReadPublic,
} from './commands/index.js';
import { Alg, Cap, Ht } from './constants.js';
import {
  type Authorized,
  type NvEntity,
  nvEntity,
  type ObjectEntity,
  objectEntity,
  unnamed,
} from './entity.js';
import { TpmError } from './error.js';
import { Rc } from './response-code.js';
import type { Session } from './session.js';
import { tpmsNvPublic } from './structures.js';
import type { Tpm } from './tpm.js';

const NOTHING = Buffer.alloc(0);
const SESSION_TYPES: readonly number[] = [Ht.HMAC_SESSION, Ht.POLICY_SESSION];

/** Steps that every user of a TPM needs, made of single commands. */

/** A new NV index. */
export interface NewNvIndex {
  /** Its handle, from 0x01000000 to 0x01ffffff; owners use 0x01800000 to 0x01bfffff (TCG handle registry). */
  readonly nvIndex: number;
  /** Of `NvAttribute`, joined with `mask`. */
  readonly attributes: number;
  /** Bytes that it holds: 8 for COUNTER, BITS and the PIN types. */
  readonly dataSize: number;
  readonly authValue?: Buffer;
  readonly authPolicy?: Buffer;
  /** One that encrypts `in` hides the authValue on its way. */
  readonly sessions?: readonly Session[];
}

/**
 * Defines an NV index (Part 3, 31.3), with SHA-256 as its nameAlg. Read it again with `readNvIndex` after the first
 * write: its Name changes then.
 * @param by the owner or platform
 * @throws TpmError
 */
export async function defineNvIndex(tpm: Tpm, by: Authorized, options: NewNvIndex): Promise<NvEntity> {
  const { nvIndex, attributes, dataSize, authPolicy = NOTHING, authValue = NOTHING } = options;
  const publicInfo = embed(tpmsNvPublic, { nvIndex, nameAlg: Alg.SHA256, attributes, authPolicy, dataSize });
  await tpm.run(NV_DefineSpace, { authHandle: by }, { auth: authValue, publicInfo }, options.sessions);
  return nvEntity(publicInfo, authValue);
}

/**
 * An object by its handle, or undefined where there is none. The Name is computed from the public area that came;
 * compare it with a trusted one before salting to the key.
 */
export async function readObject(
  tpm: Tpm,
  handle: number,
  authValue?: Uint8Array,
): Promise<ObjectEntity | undefined> {
  try {
    const read = await tpm.run(ReadPublic, { objectHandle: unnamed(handle) }, {});
    const entity = objectEntity(handle, read.outPublic, authValue);
    if (!entity.name.equals(read.name)) {
      throw new TpmError('malformed', 'answer to TPM2_ReadPublic: Name and public area do not fit');
    }
    return entity;
  } catch (error) {
    // The first for persistent handles, the second for transient ones.
    if (TpmError.is(error, Rc.HANDLE, Rc.REFERENCE_H0)) return undefined;
    throw error;
  }
}

/**
 * An NV index by its handle, or undefined where there is none. Neither is proved: the Name by a command in a session that
 * has it among its handles, its absence by `listHandles` in a session.
 */
export async function readNvIndex(
  tpm: Tpm,
  handle: number,
  authValue?: Uint8Array,
): Promise<NvEntity | undefined> {
  try {
    const read = await tpm.run(NV_ReadPublic, { nvIndex: unnamed(handle) }, {});
    const entity = nvEntity(read.nvPublic, authValue);
    if (entity.handle !== handle || !entity.name.equals(read.nvName)) {
      throw new TpmError('malformed', 'answer to TPM2_NV_ReadPublic: Name and public area do not fit');
    }
    return entity;
  } catch (error) {
    if (TpmError.is(error, Rc.HANDLE)) return undefined;
    throw error;
  }
}

/**
 * Removes a transient object or session. Never rejects with a TpmError: after a refusal it is gone already, and without an
 * answer nothing is left to do.
 */
export async function flush(tpm: Tpm, handle: number): Promise<void> {
  await tpm.run(FlushContext, {}, { flushHandle: handle }).catch((error: unknown) => {
    if (!(error instanceof TpmError)) throw error;
  });
}

/**
 * Handles in use of one type, ascending. Of sessions, TPMs give both kinds: the loaded ones for `Ht.HMAC_SESSION`, the
 * saved ones for `Ht.POLICY_SESSION` (Part 2, TPM_HT: LOADED_SESSION, SAVED_SESSION), of which only the lower
 * three bytes say which session it is.
 * @param type `Ht.TRANSIENT` and so on
 * @param sessions prove the answer; one that is only a hint needs none
 * @throws TpmError
 */
export async function listHandles(
  tpm: Tpm,
  type: number,
  sessions: readonly Session[] = [],
): Promise<number[]> {
  const handles: number[] = [];
  const types: readonly number[] = SESSION_TYPES.includes(type) ? SESSION_TYPES : [type];
  const base = type * 2 ** 24;
  for (let next = 0; ; ) {
    const { capabilityData, moreData } = await tpm.run(
      GetCapability,
      {},
      { capability: Cap.HANDLES, property: base + next, propertyCount: 254 },
      sessions,
    );
    const found = capabilityData.capability === Cap.HANDLES ? capabilityData.handles : [];
    for (const handle of found) {
      // What does not go on would never end.
      const index = handle & 0xff_ffff;
      if (index < next || !types.includes(handle >>> 24)) {
        throw new TpmError('malformed', 'answer to TPM2_GetCapability: handles that were not asked for');
      }
      handles.push(handle);
      next = index + 1;
    }
    if (!moreData || found.length === 0) return handles;
  }
}

/** One property of the TPM (`Pt`), or undefined where it does not have it. */
export async function readProperty(tpm: Tpm, property: number): Promise<number | undefined> {
  const { capabilityData } = await tpm.run(
    GetCapability,
    {},
    { capability: Cap.TPM_PROPERTIES, property, propertyCount: 1 },
  );
  if (capabilityData.capability !== Cap.TPM_PROPERTIES) return undefined;
  return capabilityData.properties.find((entry) => entry.property === property)?.value;
}

/** `size` random bytes of the TPM, in memory of their own. @param sessions to encrypt them on the way */
export async function readRandom(tpm: Tpm, size: number, sessions: readonly Session[] = []): Promise<Buffer> {
  let out: Buffer = Buffer.alloc(0);
  while (out.length < size) {
    const { randomBytes } = await tpm.run(
      GetRandom,
      {},
      { bytesRequested: Math.min(size - out.length, 0xffff) },
      sessions,
    );
    if (randomBytes.length === 0 || randomBytes.length > size - out.length) {
      throw new TpmError('malformed', `answer to TPM2_GetRandom: ${randomBytes.length} bytes`);
    }
    const longer = concat(out, randomBytes);
    wipe(out, randomBytes);
    out = longer;
  }
  return out;
}
