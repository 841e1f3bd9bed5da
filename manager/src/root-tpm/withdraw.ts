import { EvictControl, inSession, permanent, Rh, readObject, type Tpm, withSession } from 'tpm2-ts-bindings';
import { hexHandle, type RootTpmEnrolment } from './enrolment.js';
import { indicesInRange, removeIndex } from './nv-index.js';

export interface WithdrawOptions {
  /** For chips with an owner password. */
  ownerAuth?: Uint8Array;
  /** Removes the storage root key too, where the enrolment made it and no other installation is seen to use it. */
  evict: boolean;
}

/** What was taken out of the TPM and what stays, a phrase for people each. */
export interface Withdrawal {
  readonly removed: readonly string[];
  readonly left: readonly string[];
}

/**
 * Takes out of the TPM what the enrolment put there: afterwards the root key does not exist any more. Only objects with
 * the enrolled Names are touched. What is gone already is no error, so that an interrupted withdrawal can be repeated.
 */
export async function withdraw(
  tpm: Tpm,
  enrolment: RootTpmEnrolment,
  { ownerAuth = new Uint8Array(0), evict }: WithdrawOptions,
): Promise<Withdrawal> {
  const removed: string[] = [];
  const left: string[] = [];
  const owner = permanent(Rh.OWNER, ownerAuth);
  const { root, anchor, revocation } = enrolment;
  const indices = [
    [{ handle: root.nvHandle, name: root.nvName }, 'a half of the root key'],
    [anchor, 'the counter of states of the store'],
    [revocation, 'the counter of revocations'],
  ] as const;
  const key = `storage root key ${hexHandle(enrolment.srkHandle)}`;
  const srk = await readObject(tpm, enrolment.srkHandle);
  const isOurSrk = srk?.name.toString('hex') === enrolment.srkName;
  if (!isOurSrk)
    left.push(`what cannot be proved without the enrolled ${key}: the TPM's answers, told below`);
  await inSession(tpm, { kind: 'hmac', ...(isOurSrk && { salt: srk }) }, async (session) => {
    for (const [ref, role] of indices) {
      const what = `NV index ${hexHandle(ref.handle)}`;
      const removal = await removeIndex(tpm, session, owner, ref);
      if (removal === 'gone') left.push(`no ${what}: it was gone already`);
      else if (removal === 'other') left.push(`${what}: it is not the one that init made`);
      else removed.push(`${what} of the TPM, ${role}`);
    }
  });
  const own = new Set(indices.map(([{ handle }]) => handle));
  const others = (await indicesInRange(tpm)).filter((handle) => !own.has(handle));
  if (srk === undefined) {
    left.push(`no ${key}: it was gone already`);
  } else if (!enrolment.srkCreatedByUs) {
    left.push(`the ${key}: it was in the TPM before init`);
  } else if (!isOurSrk) {
    left.push(`the ${key}: it is not the one that init made`);
  } else if (!evict) {
    left.push(`the ${key}: other programs may use it (--evict removes it)`);
  } else if (others.length > 0) {
    left.push(
      `the ${key}: another installation seems to use it (NV index ${others.map(hexHandle).join(', ')})`,
    );
  } else {
    try {
      await inSession(tpm, { kind: 'hmac' }, (session) =>
        tpm.run(
          EvictControl,
          { auth: withSession(owner, session), objectHandle: srk },
          { persistentHandle: enrolment.srkHandle },
        ),
      );
      removed.push(`${key} of the TPM`);
    } catch (error) {
      // The index is gone, so that only the rest is told: it holds no secret of the installation any more.
      left.push(`the ${key}: ${(error as Error).message}`);
    }
  }
  return { removed, left };
}
