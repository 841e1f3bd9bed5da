import {
  ObjectAttribute as A,
  Alg,
  Create,
  embed,
  flush,
  Load,
  NV_DefineSpace,
  NV_UndefineSpace,
  type NvEntity,
  nvEntity,
  type ObjectEntity,
  objectEntity,
  type PublicArea,
  permanent,
  policyDigest,
  publicArea,
  Rc,
  Rh,
  readNvIndex,
  type Tpm,
  TpmError,
  tpmsNvPublic,
  withPassword,
} from 'tpm2-ts-bindings';
import { NOTHING } from '../support/tpm-fixture.js';

/** Things in a TPM that a test needs for a while. */

export const OWNER = permanent(Rh.OWNER);

/** Data that its authValue opens; with `policy` through PolicyAuthValue instead. */
export function dataTemplate({ policy = false, nameAlg = Alg.SHA256 as number } = {}): PublicArea {
  return publicArea({
    type: Alg.KEYEDHASH,
    nameAlg,
    objectAttributes: A.fixedTPM | A.fixedParent | A.noDA | (policy ? 0 : A.userWithAuth),
    authPolicy: policy ? policyDigest([{ assert: 'auth-value' }], nameAlg) : NOTHING,
    parameters: { scheme: { scheme: Alg.NULL } },
    unique: NOTHING,
  });
}

/** A child of `parent`, not loaded. */
export function create(
  tpm: Tpm,
  parent: ObjectEntity,
  inPublic: PublicArea,
  content: { auth?: Buffer; data?: Buffer } = {},
) {
  return tpm.run(
    Create,
    { parentHandle: withPassword(parent) },
    {
      inSensitive: { userAuth: content.auth ?? NOTHING, data: content.data ?? NOTHING },
      inPublic,
      outsideInfo: NOTHING,
      creationPCR: [],
    },
  );
}

/** Loads a child for `body` and flushes it. */
export async function withChild<T>(
  tpm: Tpm,
  parent: ObjectEntity,
  child: { outPrivate: Buffer; outPublic: PublicArea },
  body: (entity: ObjectEntity) => Promise<T>,
  auth: Buffer = NOTHING,
): Promise<T> {
  const { objectHandle } = await tpm.run(
    Load,
    { parentHandle: withPassword(parent) },
    { inPrivate: child.outPrivate, inPublic: child.outPublic },
  );
  try {
    return await body(objectEntity(objectHandle, child.outPublic, auth));
  } finally {
    await flush(tpm, objectHandle);
  }
}

/** Defines an index for `body` and removes it. Its Name changes with the first write: `current` reads it again. */
export async function withNv<T>(
  tpm: Tpm,
  options: { attributes: number; size: number; auth?: Buffer; policy?: Buffer; handle?: number },
  body: (index: NvEntity, current: () => Promise<NvEntity>) => Promise<T>,
): Promise<T> {
  const handle = options.handle ?? 0x01820000;
  const auth = options.auth ?? NOTHING;
  const publicInfo = embed(tpmsNvPublic, {
    nvIndex: handle,
    nameAlg: 0x000b,
    attributes: options.attributes,
    authPolicy: options.policy ?? NOTHING,
    dataSize: options.size,
  });
  await tpm.run(NV_DefineSpace, { authHandle: withPassword(OWNER) }, { auth, publicInfo });
  const current = async (): Promise<NvEntity> => {
    const index = await readNvIndex(tpm, handle, auth);
    if (index === undefined) throw new Error('the index is gone');
    return index;
  };
  try {
    return await body(nvEntity(publicInfo, auth), current);
  } finally {
    await tpm.run(NV_UndefineSpace, { authHandle: withPassword(OWNER), nvIndex: await current() }, {});
  }
}

/** For assert.rejects: the TPM answered with one of these. */
export const says =
  (...codes: (keyof typeof Rc)[]) =>
  (error: unknown): boolean => {
    if (TpmError.is(error, ...codes.map((code) => Rc[code]))) return true;
    throw error;
  };

/** For assert.rejects and throws: this package refused. */
export const has = (code: TpmError['code']) => (error: unknown) => {
  if (error instanceof TpmError && error.code === code) return true;
  throw error;
};
