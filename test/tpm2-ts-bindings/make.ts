import {
  ObjectAttribute as A,
  Alg,
  type Child,
  createChild,
  defineNvIndex,
  loadChild,
  NV_UndefineSpace,
  type NvEntity,
  type ObjectEntity,
  type PublicArea,
  permanent,
  policyDigest,
  publicArea,
  Rc,
  Rh,
  readNvIndex,
  type Tpm,
  TpmError,
  whileLoaded,
  withPassword,
} from 'tpm2-ts-bindings';
import { isA } from '../support/is-a.js';
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
  { auth = NOTHING, data = NOTHING }: { auth?: Buffer; data?: Buffer } = {},
): Promise<Child> {
  return createChild(tpm, withPassword(parent), inPublic, { authValue: auth, data });
}

/** Loads a child for `body` and flushes it. */
export function withChild<T>(
  tpm: Tpm,
  parent: ObjectEntity,
  child: Child,
  body: (entity: ObjectEntity) => Promise<T>,
  auth: Buffer = NOTHING,
): Promise<T> {
  return whileLoaded(tpm, loadChild(tpm, withPassword(parent), child, { authValue: auth }), body);
}

/** Defines an index for `body` and removes it. Its Name changes with the first write: `current` reads it again. */
export async function withNv<T>(
  tpm: Tpm,
  options: { attributes: number; size: number; auth?: Buffer; policy?: Buffer; handle?: number },
  body: (index: NvEntity, current: () => Promise<NvEntity>) => Promise<T>,
): Promise<T> {
  const handle = options.handle ?? 0x01820000;
  const auth = options.auth ?? NOTHING;
  const defined = await defineNvIndex(tpm, withPassword(OWNER), {
    nvIndex: handle,
    attributes: options.attributes,
    dataSize: options.size,
    authValue: auth,
    authPolicy: options.policy ?? NOTHING,
  });
  const current = async (): Promise<NvEntity> => {
    const index = await readNvIndex(tpm, handle, auth);
    if (index === undefined) throw new Error('the index is gone');
    return index;
  };
  try {
    return await body(defined, current);
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
  if (isA(error, TpmError) && error.code === code) return true;
  throw error;
};
