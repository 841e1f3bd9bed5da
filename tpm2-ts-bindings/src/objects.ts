import { flush } from './client.js';
import { Create, CreatePrimary, Duplicate, Import, Load, LoadExternal } from './commands/index.js';
import { Alg, Rh } from './constants.js';
import type { Wrapped } from './duplicate.js';
import {
  type Authorized,
  type ObjectEntity,
  objectEntity,
  permanent,
  withPassword,
  withSession,
} from './entity.js';
import { TpmError } from './error.js';
import type { Session } from './session.js';
import type { PublicArea } from './structures.js';
import type { Tpm } from './tpm.js';

const NOTHING = Buffer.alloc(0);

/** Objects from their making to their flush, each step one command. */

/** What goes into a new object, and how it gets to the TPM. */
export interface NewObject {
  /** At most as long as a digest of the object's nameAlg. Empty unless given. */
  readonly authValue?: Buffer;
  /** What a sealed object holds, at most 128 bytes (Part 2, MAX_SYM_DATA). */
  readonly data?: Buffer;
  /** Further sessions. One that encrypts `in` hides authValue and data on their way. */
  readonly sessions?: readonly Session[];
}

/** Where a primary object comes from. */
export interface NewPrimary extends NewObject {
  /** The owner's with an empty password unless given. */
  readonly hierarchy?: Authorized;
  /**
   * The Name that was recorded when the machine was trusted. Whoever can change what is on the bus may offer a key of
   * his own: give it before salting to the key or wrapping anything for it.
   */
  readonly name?: Buffer;
}

/**
 * Makes a primary object (Part 3, 24.1): the same key each time for the same template, until the hierarchy is cleared.
 * It takes up a slot of the TPM: flush it, or use `whileLoaded`.
 * @throws TpmError, `malformed` where it is another key than the one of that Name; that one is flushed
 */
export async function createPrimary(
  tpm: Tpm,
  template: PublicArea,
  options: NewPrimary = {},
): Promise<ObjectEntity> {
  const { hierarchy = withPassword(permanent(Rh.OWNER)) } = options;
  const created = await tpm.run(
    CreatePrimary,
    { primaryHandle: hierarchy },
    creation(template, options),
    options.sessions,
  );
  const object = loaded('CreatePrimary', created, created.outPublic, options.authValue);
  if (options.name !== undefined && !object.name.equals(options.name)) {
    await flush(tpm, object.handle);
    throw new TpmError(
      'malformed',
      `answer to TPM2_CreatePrimary: another key than the trusted one; its Name is ${object.name.toString('hex')}`,
    );
  }
  return object;
}

/** A child as its parent wrapped it: store both parts, load it when it is needed. */
export interface Child {
  readonly outPrivate: Buffer;
  readonly outPublic: PublicArea;
}

/** Makes a key or sealed object under `parent` (Part 3, 12.1). It is not loaded. @throws TpmError */
export async function createChild(
  tpm: Tpm,
  parent: Authorized,
  template: PublicArea,
  options: NewObject = {},
): Promise<Child> {
  const { outPrivate, outPublic } = await tpm.run(
    Create,
    { parentHandle: parent },
    creation(template, options),
    options.sessions,
  );
  return { outPrivate, outPublic };
}

/**
 * Loads a child that `createChild` made or Import took in (Part 3, 12.2).
 * It takes up a slot of the TPM: flush it, or use `whileLoaded`.
 * @throws TpmError
 */
export async function loadChild(
  tpm: Tpm,
  parent: Authorized,
  child: Child,
  options: Pick<NewObject, 'authValue' | 'sessions'> = {},
): Promise<ObjectEntity> {
  const answer = await tpm.run(
    Load,
    { parentHandle: parent },
    { inPrivate: child.outPrivate, inPublic: child.outPublic },
    options.sessions,
  );
  return loaded('Load', answer, child.outPublic, options.authValue);
}

/**
 * Loads a public key from outside (Part 3, 12.3), to verify with or to duplicate to.
 * It takes up a slot of the TPM: flush it, or use `whileLoaded`.
 * @throws TpmError
 */
export async function loadPublic(tpm: Tpm, area: PublicArea): Promise<ObjectEntity> {
  // Tickets of keys in the null hierarchy prove nothing, so it goes into the owner's.
  const params = { inPrivate: undefined, inPublic: area, hierarchy: Rh.OWNER };
  return loaded('LoadExternal', await tpm.run(LoadExternal, {}, params), area, NOTHING);
}

/**
 * Wraps an object for a parent in another TPM (Part 3, 13.1), without an inner wrapper: for `importChild` there, or
 * `unwrapDuplicate`. A change on the way does not go unnoticed.
 * @param session of a policy that allows it. ADMIN role: a password never does
 * @throws TpmError
 */
export function duplicateTo(
  tpm: Tpm,
  object: ObjectEntity,
  session: Session,
  newParent: PublicArea,
): Promise<Wrapped> {
  return whileLoaded(tpm, loadPublic(tpm, newParent), async (newParentHandle) => {
    const { duplicate, outSymSeed } = await tpm.run(
      Duplicate,
      { objectHandle: withSession(object, session), newParentHandle },
      { encryptionKeyIn: NOTHING, symmetricAlg: { algorithm: Alg.NULL } },
    );
    return {
      encryptionKey: NOTHING,
      objectPublic: object.publicArea,
      duplicate,
      inSymSeed: outSymSeed,
      symmetricAlg: { algorithm: Alg.NULL },
    };
  });
}

/** Takes an object in that was wrapped for `parent` (Part 3, 13.3), by a TPM or by `wrapForImport`. @throws TpmError */
export async function importChild(tpm: Tpm, parent: Authorized, wrapped: Wrapped): Promise<Child> {
  const { outPrivate } = await tpm.run(Import, { parentHandle: parent }, wrapped);
  return { outPrivate, outPublic: wrapped.objectPublic };
}

/** Runs `body` with an object that is flushed afterwards, whatever happens. */
export async function whileLoaded<T>(
  tpm: Tpm,
  loading: Promise<ObjectEntity>,
  body: (object: ObjectEntity) => Promise<T>,
): Promise<T> {
  const object = await loading;
  try {
    return await body(object);
  } finally {
    await flush(tpm, object.handle);
  }
}

function creation(inPublic: PublicArea, { authValue = NOTHING, data = NOTHING }: NewObject) {
  return { inSensitive: { userAuth: authValue, data }, inPublic, outsideInfo: NOTHING, creationPCR: [] };
}

/** The Name is computed here; the TPM's own is only compared with it. */
function loaded(
  command: string,
  answer: { readonly objectHandle: number; readonly name: Buffer },
  area: PublicArea,
  authValue: Buffer | undefined,
): ObjectEntity {
  const entity = objectEntity(answer.objectHandle, area, authValue);
  if (!entity.name.equals(answer.name)) {
    throw new TpmError('malformed', `answer to TPM2_${command}: Name and public area do not fit`);
  }
  return entity;
}
