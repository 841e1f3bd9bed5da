import { createTpm, openDevice, openSocket, type Tpm } from 'tpm2-ts-bindings';
import { type EnrolOptions, enrol } from './enrol.js';
import type { RootTpmEnrolment, RootTpmLocation } from './enrolment.js';
import { translated } from './failure.js';
import { releaseRootKey } from './release.js';
import { flushLeftovers, start } from './start.js';

export type { EnrolOptions } from './enrol.js';
export type { RootTpmEnrolment, RootTpmLocation } from './enrolment.js';

/** The TPM that holds the manager's root key. One call at a time is under way; further ones wait. */
export interface RootTpm {
  /**
   * Makes the root key: a secret sealed under the storage root key and a half in an NV index, both given out only while
   * the selected PCRs have the values that they have now. An SRK that is there is used and never replaced; where there
   * is none, one is made by the TCG template. Proves the enrolment by releasing the key once.
   * @param options.pcrSelection like `sha256:7` or `sha256:0,2,7`
   * @param options.ownerAuth for chips with an owner password
   * @returns what to keep, and the root key (32 bytes, the caller wipes it)
   * @throws ManagerError `bad-request`, `tpm-unfit`, `tpm-fault`, `tpm-unreachable`
   */
  enrol(options: EnrolOptions): Promise<{ enrolment: RootTpmEnrolment; rootKey: Buffer }>;
  /**
   * Checks that this is the TPM of the enrolment, then releases the root key (32 bytes, the caller wipes it).
   * @throws ManagerError `tpm-changed`, `tpm-emptied`, `platform-policy`, `tpm-fault`, `tpm-unreachable`
   */
  releaseRootKey(enrolment: RootTpmEnrolment): Promise<Buffer>;
  close(): Promise<void>;
}

/**
 * Connects. TPM2_Startup is sent only to a software TPM that waits for it: a chip was started by the firmware, and one
 * that was not has measured nothing.
 * @throws ManagerError `tpm-unreachable`, `tpm-fault`
 */
export async function openRootTpm(location: RootTpmLocation): Promise<RootTpm> {
  return translated(async () => {
    const transport =
      location.kind === 'device' ? await openDevice(location.path) : await openSocket(location.path);
    const tpm = createTpm(transport);
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

class OpenRootTpm implements RootTpm {
  #last: Promise<unknown> = Promise.resolve();
  constructor(
    private readonly tpm: Tpm,
    private readonly location: RootTpmLocation,
  ) {}

  enrol(options: EnrolOptions): Promise<{ enrolment: RootTpmEnrolment; rootKey: Buffer }> {
    return this.#inTurn(() => enrol(this.tpm, this.location, options));
  }

  releaseRootKey(enrolment: RootTpmEnrolment): Promise<Buffer> {
    return this.#inTurn(() => releaseRootKey(this.tpm, enrolment));
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
