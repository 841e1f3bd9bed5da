import {
  inSession,
  NV_Increment,
  permanent,
  Rh,
  type Session,
  type Tpm,
  withSession,
} from 'tpm2-ts-bindings';
import type { PlatformState } from './approvals.js';
import { checkEnrolmentFormat, type RootTpmEnrolment } from './enrolment.js';
import { enrolledRevocation, readCounter } from './nv-counter.js';
import { readPcrState } from './platform-state.js';
import { enrolledSrk, explainOwner } from './srk.js';

/** What an approval would be of: proved by the TPM, as an authority may sign it. */
export function readPlatformState(
  tpm: Tpm,
  enrolment: RootTpmEnrolment,
  pcrSelection: string = enrolment.root.pcrSelection,
): Promise<PlatformState> {
  return salted(tpm, enrolment, async (session) => ({
    pcrs: await readPcrState(tpm, pcrSelection, session),
    counter: await readCounter(tpm, await enrolledRevocation(tpm, enrolment), [session]),
  }));
}

export function readRevocation(tpm: Tpm, enrolment: RootTpmEnrolment): Promise<bigint> {
  return salted(tpm, enrolment, async (session) =>
    readCounter(tpm, await enrolledRevocation(tpm, enrolment), [session]),
  );
}

/** @returns the value after it. Every approval of a value before is dead from now on. */
export function incrementRevocation(
  tpm: Tpm,
  enrolment: RootTpmEnrolment,
  ownerAuth: Uint8Array,
): Promise<bigint> {
  return salted(tpm, enrolment, async (session) => {
    const nvIndex = await enrolledRevocation(tpm, enrolment);
    const authHandle = withSession(permanent(Rh.OWNER, ownerAuth), session);
    await tpm.run(NV_Increment, { authHandle, nvIndex }, {}).catch(explainOwner);
    return readCounter(tpm, nvIndex, [session]);
  });
}

async function salted<T>(
  tpm: Tpm,
  enrolment: RootTpmEnrolment,
  body: (session: Session) => Promise<T>,
): Promise<T> {
  checkEnrolmentFormat(enrolment);
  const srk = await enrolledSrk(tpm, enrolment);
  return inSession(tpm, { kind: 'hmac', salt: srk }, body);
}
