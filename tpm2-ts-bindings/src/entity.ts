import { trimTrailingZeros, u32Bytes } from './bytes.js';
import { nameOf } from './crypto.js';
import type { Session } from './session.js';
import type { NvPublic, PublicArea } from './structures.js';
import type { Embedded } from './wire.js';

/** Something with a handle. Name and authValue stay with it, so that neither can be mixed up or forgotten. */
export interface Entity {
  readonly handle: number;
  /** Its Name (Part 1, "Names"). Undefined only where it is not known yet: then no session can be used with it. */
  readonly name: Buffer | undefined;
  /** Without trailing zeros. */
  readonly authValue: Uint8Array;
}

/** A key or sealed object in the TPM. */
export interface ObjectEntity extends Entity {
  readonly name: Buffer;
  readonly publicArea: PublicArea;
}

/** An NV index. Its Name changes with the first write: read it again then. */
export interface NvEntity extends Entity {
  readonly name: Buffer;
  readonly nvPublic: Embedded<NvPublic>;
}

/** An entity with what authorises its use in one command. */
export interface Authorized {
  readonly entity: Entity;
  readonly by: Session | 'password';
}

const NO_AUTH = new Uint8Array(0);

/** A hierarchy, PCR or other handle whose Name is the handle itself. */
export function permanent(handle: number, authValue: Uint8Array = NO_AUTH): Entity {
  return { handle, name: u32Bytes(handle), authValue: trimTrailingZeros(authValue) };
}

/** A handle alone: enough for commands that only read public areas. */
export function unnamed(handle: number): Entity {
  return { handle, name: undefined, authValue: NO_AUTH };
}

/** An object; the Name is computed from the public area, not taken from anyone. */
export function objectEntity(
  handle: number,
  publicArea: PublicArea,
  authValue: Uint8Array = NO_AUTH,
): ObjectEntity {
  const name = nameOf(publicArea.value.nameAlg, publicArea.bytes);
  return { handle, name, publicArea, authValue: trimTrailingZeros(authValue) };
}

export function nvEntity(nvPublic: Embedded<NvPublic>, authValue: Uint8Array = NO_AUTH): NvEntity {
  const { nvIndex, nameAlg } = nvPublic.value;
  return {
    handle: nvIndex,
    name: nameOf(nameAlg, nvPublic.bytes),
    nvPublic,
    authValue: trimTrailingZeros(authValue),
  };
}

/** A hash or HMAC sequence: it has no public area, so its Name is empty (Part 1, "Names"). */
export function sequenceEntity(handle: number, authValue: Uint8Array = NO_AUTH): Entity {
  return { handle, name: Buffer.alloc(0), authValue: trimTrailingZeros(authValue) };
}

/** Authorises with the authValue itself, readable by whoever sees the bus: for empty values and tests. */
export function withPassword(entity: Entity): Authorized {
  return { entity, by: 'password' };
}

/** Authorises with an HMAC or policy session. */
export function withSession(entity: Entity, session: Session): Authorized {
  return { entity, by: session };
}
