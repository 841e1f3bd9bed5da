import { createTpm, openDevice, openSocket, type Tpm } from 'tpm2-ts-bindings';
import { type Enrolled, type EnrolOptions, enrol } from './enrol.js';
import type { RootTpmEnrolment, RootTpmLocation } from './enrolment.js';
import { examine, type TpmFacts } from './examine.js';
import { translated } from './failure.js';
import { releaseRootKey } from './release.js';
import { flushLeftovers, start } from './start.js';
import { type Withdrawal, type WithdrawOptions, withdraw } from './withdraw.js';

export type { EnrolOptions } from './enrol.js';
export type { RootTpmEnrolment, RootTpmLocation } from './enrolment.js';
export type { Withdrawal, WithdrawOptions } from './withdraw.js';

const DEADLINE_MS = 60_000;

/** The TPM that holds the manager's root key. One call at a time is under way; further ones wait. */
export interface RootTpm {
  /**
   * Makes the root key: a secret sealed under the storage root key and a half in an NV index, both given out only while
   * the selected PCRs have the values that they have now. An SRK that is there is used and never replaced; where there
   * is none, one is made by the TCG template. Proves the enrolment by releasing the key once.
   * @param options.pcrSelection like `sha256:7` or `sha256:0,2,7`
   * @param options.ownerAuth for chips with an owner password
   * @returns what to keep, the root key (32 bytes, the caller wipes it), and what was there of other installations
   * @throws ManagerError `bad-request`, `tpm-unfit`, `tpm-fault`, `tpm-unreachable`
   */
  enrol(options: EnrolOptions): Promise<Enrolled>;
  /**
   * Checks that this is the TPM of the enrolment, then releases the root key (32 bytes, the caller wipes it).
   * @throws ManagerError `tpm-changed`, `tpm-emptied`, `platform-policy`, `tpm-fault`, `tpm-busy`, `tpm-lockout`,
   * `tpm-unreachable`
   */
  releaseRootKey(enrolment: RootTpmEnrolment): Promise<Buffer>;
  /**
   * Takes out of the TPM what the enrolment put there, for good. Can be repeated.
   * @throws ManagerError `bad-request` where the owner password is another, and the TPM's
   */
  withdraw(enrolment: RootTpmEnrolment, options: WithdrawOptions): Promise<Withdrawal>;
  /** What the TPM is like, by commands that only read. @throws ManagerError `tpm-fault`, `tpm-unreachable` */
  examine(enrolment: RootTpmEnrolment): Promise<TpmFacts>;
  close(): Promise<void>;
}

/**
 * Looks at a TPM that nobody has opened here, by commands that only read: not even TPM2_Startup is sent.
 * @param srkHandle where init would look for a storage root key
 * @throws ManagerError `tpm-fault`, `tpm-unreachable`
 */
export async function examineRootTpm(
  location: RootTpmLocation,
  srkHandle: number,
  enrolment: RootTpmEnrolment | undefined,
  deadlineMs: number,
): Promise<TpmFacts> {
  return translated(async () => {
    const tpm = await connect(location, deadlineMs);
    try {
      return await examine(tpm, srkHandle, enrolment);
    } finally {
      await tpm.close();
    }
  });
}

/**
 * Connects. TPM2_Startup is sent only to a software TPM that waits for it: a chip was started by the firmware, and one
 * that was not has measured nothing.
 * @param deadlineMs for the answer to one command of a software TPM (the kernel bounds those of a device), and for the
 * pauses before a command that the TPM did not execute is sent again
 * @throws ManagerError `tpm-unreachable`, `tpm-fault`
 */
export async function openRootTpm(
  location: RootTpmLocation,
  deadlineMs: number = DEADLINE_MS,
): Promise<RootTpm> {
  return translated(async () => {
    const tpm = await connect(location, deadlineMs);
    try {
      await start(tpm, location);
      // The embedded TPM has no other user: what is loaded was left by a manager that was killed.
      if (location.kind === 'embedded') await flushLeftovers(tpm);
    } catch (error) {
      await tpm.close();
      throw error;
    }
    return new OpenRootTpm(tpm, location);
  });
}

async function connect(location: RootTpmLocation, deadlineMs: number): Promise<Tpm> {
  const transport =
    location.kind === 'device'
      ? await openDevice(location.path)
      : await openSocket(location.path, { connectTimeout: deadlineMs, deadline: deadlineMs });
  return createTpm(transport, { total: deadlineMs });
}

class OpenRootTpm implements RootTpm {
  #last: Promise<unknown> = Promise.resolve();
  constructor(
    private readonly tpm: Tpm,
    private readonly location: RootTpmLocation,
  ) {}

  enrol(options: EnrolOptions): Promise<Enrolled> {
    return this.#inTurn(() => enrol(this.tpm, this.location, options));
  }

  releaseRootKey(enrolment: RootTpmEnrolment): Promise<Buffer> {
    return this.#inTurn(() => releaseRootKey(this.tpm, enrolment));
  }

  withdraw(enrolment: RootTpmEnrolment, options: WithdrawOptions): Promise<Withdrawal> {
    return this.#inTurn(() => withdraw(this.tpm, enrolment, options));
  }

  examine(enrolment: RootTpmEnrolment): Promise<TpmFacts> {
    return this.#inTurn(() => examine(this.tpm, enrolment.srkHandle, enrolment));
  }

  async close(): Promise<void> {
    await this.#last;
    await this.tpm.close();
  }

  // Two at once would need more sessions and objects than a chip has room for.
  #inTurn<T>(body: () => Promise<T>): Promise<T> {
    const turn = this.#last.then(() => translated(body));
    this.#last = turn.catch(() => undefined);
    return turn;
  }
}
