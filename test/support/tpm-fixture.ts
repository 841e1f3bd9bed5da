import assert from 'node:assert/strict';
import {
  createPrimary,
  createTpm,
  type Entity,
  Ht,
  listHandles,
  type ObjectEntity,
  openSocket,
  type PublicArea,
  permanent,
  Rh,
  type Tpm,
  whileLoaded,
  withPassword,
} from 'tpm2-ts-bindings';

import { type Swtpm, startSwtpm } from './swtpm.js';

export const NOTHING = Buffer.alloc(0);

/** A client of a TPM's data socket. */
export async function connectTpm(path: string): Promise<Tpm> {
  return createTpm(await openSocket(path));
}

/** A primary object of the owner, unless another hierarchy is given, flushed after `body`. */
export function withPrimary<T>(
  tpm: Tpm,
  template: PublicArea,
  body: (key: ObjectEntity) => Promise<T>,
  userAuth: Buffer = NOTHING,
  hierarchy: Entity = permanent(Rh.OWNER),
): Promise<T> {
  const options = { authValue: userAuth, hierarchy: withPassword(hierarchy) };
  return whileLoaded(tpm, createPrimary(tpm, template, options), body);
}

/** No object or session was left in the TPM. */
export async function assertNothingLeaked(tpm: Tpm): Promise<void> {
  for (const type of [Ht.TRANSIENT, Ht.HMAC_SESSION, Ht.POLICY_SESSION]) {
    assert.deepEqual(await listHandles(tpm, type), [], `handles of type 0x${type.toString(16)} were left`);
  }
}

/** Gives the suite that calls it a TPM of its own, and at the end checks that nothing was left in it. */
export function withSuiteTpm(use: (tpm: Tpm) => void): void {
  let swtpm: Swtpm;
  let tpm: Tpm;
  before(async () => {
    swtpm = await startSwtpm();
    tpm = await connectTpm(swtpm.socket);
    use(tpm);
  });
  after(async () => {
    await assertNothingLeaked(tpm);
    await tpm.close();
    await swtpm.stop();
  });
}
