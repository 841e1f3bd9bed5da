import {
  type Approval,
  type Credential,
  createTpm,
  intercepted,
  type ObservedExchange,
  openDevice,
  openSocket,
  type Tpm,
  TpmError,
} from 'tpm2-ts-bindings';
import { metrics } from '../metrics.js';
import { type AnchorCounter, SessionCounter } from './anchor-counter.js';
import type { PlatformState } from './approvals.js';
import { makeAttestationKey } from './attestation-key.js';
import { activateCredential, type Endorsement, readEndorsement } from './endorsement.js';
import {
  checkAnchorAuth,
  type Enrolled,
  type EnrolOptions,
  enrol,
  type RecreateOptions,
  recreateAnchorCounter,
} from './enrol.js';
import {
  checkEnrolmentFormat,
  type NvIndexRef,
  type RootGeneration,
  type RootTpmEnrolment,
  type RootTpmLocation,
} from './enrolment.js';
import { examine, type TpmFacts } from './examine.js';
import { translated } from './failure.js';
import {
  eraseIndices,
  type NewGeneration,
  type NextGenerationOptions,
  nextGeneration,
} from './generation.js';
import { type ImportKey, makeImportKey } from './import-key.js';
import type { Removal } from './nv-index.js';
import { certifyRevocation, type QuoteBytes, quote, type StatementBytes } from './quote.js';
import { releaseRootKey } from './release.js';
import { incrementRevocation, readPlatformState, readRevocation } from './revocation.js';
import { flushLeftovers, start } from './start.js';
import { Turns } from './turns.js';
import { type Withdrawal, type WithdrawOptions, withdraw } from './withdraw.js';

export type { AnchorCounter } from './anchor-counter.js';
export { isApproved, type PlatformState, readAuthority, requestApproval } from './approvals.js';
export { attestationPublic } from './attestation-key.js';
export type { Endorsement } from './endorsement.js';
export type { Enrolled, EnrolOptions, RecreateOptions } from './enrol.js';
export type {
  AnchorIndex,
  GenerationPolicy,
  NvIndexRef,
  RootGeneration,
  RootTpmEnrolment,
  RootTpmLocation,
} from './enrolment.js';
export type { BeforeDefine, NewGeneration, NextGenerationOptions, PolicyChoice } from './generation.js';
export type { ImportKey } from './import-key.js';
export type { Removal } from './nv-index.js';
export type { QuoteBytes, StatementBytes } from './quote.js';
export { rootKeyFromInputs } from './root-key.js';
export type { Withdrawal, WithdrawOptions } from './withdraw.js';

const DEADLINE_MS = 60_000;

/**
 * The TPM that holds the manager's root key. One call at a time is under way; further ones wait, and those of the anchor
 * counter wait for none but the one under way. After a connection was lost, the next call makes a new one.
 */
export interface RootTpm {
  /**
   * Makes the first generation of the root key: a secret sealed under the storage root key and a half in an NV index,
   * both given out only while the selected PCRs have the values that they have now; and the two counters. An SRK that is
   * there is used and never replaced; where there is none, one is made by the TCG template. Proves the enrolment by
   * releasing the key once.
   * @param options.pcrSelection like `sha256:7` or `sha256:0,2,7`
   * @param options.ownerAuth for chips with an owner password
   * @returns what to keep, the root key and its inputs (the caller wipes them), and what was there of other installations
   * @throws ManagerError `bad-request`, `tpm-unfit`, `tpm-fault`, `tpm-unreachable`
   */
  enrol(options: EnrolOptions): Promise<Enrolled>;
  /**
   * Checks that this is the TPM of the enrolment, then releases the root key (32 bytes, the caller wipes it).
   * @param approvals of the authority, in any number; needed where the generation has one. None of them needs to be good
   * @throws ManagerError `tpm-changed`, `tpm-emptied`, `platform-policy`, `tpm-fault`, `tpm-busy`, `tpm-lockout`,
   * `tpm-unreachable`, `older-format`, `newer-format`
   */
  releaseRootKey(enrolment: RootTpmEnrolment, approvals?: readonly Approval[]): Promise<Buffer>;
  /**
   * Makes another generation beside the one that is: a rotation; with another policy, the adoption of an authority or a
   * change of registers. Both open until the old one is erased, so the caller keeps both enrolments until everything that
   * hangs on the root key is wrapped anew.
   * @throws ManagerError as `enrol` and `releaseRootKey`; then nothing is left in the TPM
   */
  nextGeneration(enrolment: RootTpmEnrolment, options?: NextGenerationOptions): Promise<NewGeneration>;
  /**
   * Overwrites the NV half of a generation that is no longer needed and removes its index: what was sealed for it is
   * worthless, on old disks too. Only an index with the enrolled Name is touched. Can be repeated.
   * @param enrolment the one that stays
   * @returns what the chip has proved: whichever it is, the half is not in it any more
   * @throws ManagerError `bad-request` where `old` is what the enrolment needs, or the owner password is another;
   * `tpm-fault` where an answer was changed on its way: then nothing is known of the half
   */
  eraseGeneration(enrolment: RootTpmEnrolment, old: RootGeneration, ownerAuth?: Uint8Array): Promise<Removal>;
  /** The same for indices that `beforeDefine` named and a crash left. In their order. */
  eraseIndices(
    enrolment: RootTpmEnrolment,
    refs: readonly NvIndexRef[],
    ownerAuth?: Uint8Array,
  ): Promise<Removal[]>;
  /** What an approval would be of, now. @param pcrSelection the generation's, unless given */
  readPlatformState(enrolment: RootTpmEnrolment, pcrSelection?: string): Promise<PlatformState>;
  /** @throws ManagerError `tpm-emptied`, `tpm-changed` */
  readRevocationCounter(enrolment: RootTpmEnrolment): Promise<bigint>;
  /**
   * Revokes every approval that is not of the value after. Sign those that shall survive for that value first.
   * @returns the value after
   */
  incrementRevocationCounter(enrolment: RootTpmEnrolment, ownerAuth?: Uint8Array): Promise<bigint>;
  /** @param anchorAuth what was given to `enrol`; copied, and wiped by `close` */
  anchorCounter(enrolment: RootTpmEnrolment, anchorAuth: Uint8Array): AnchorCounter;
  /**
   * A new anchor counter, above every value that a counter of this chip ever had. Only for who knowingly gives up what the
   * last one said; that one is left, see `eraseIndices`.
   * @returns the enrolment with it
   */
  recreateAnchorCounter(
    enrolment: RootTpmEnrolment,
    anchorAuth: Uint8Array,
    options?: RecreateOptions,
  ): Promise<RootTpmEnrolment>;
  /**
   * Takes out of the TPM what the enrolment put there, for good. Can be repeated.
   * @throws ManagerError `bad-request` where the owner password is another, and the TPM's
   */
  withdraw(enrolment: RootTpmEnrolment, options: WithdrawOptions): Promise<Withdrawal>;
  /** What the TPM is like, by commands that only read. @throws ManagerError `tpm-fault`, `tpm-unreachable` */
  examine(enrolment: RootTpmEnrolment): Promise<TpmFacts>;
  /**
   * The endorsement key and its certificates: by what other hosts know the chip.
   * @throws ManagerError `tpm-unfit` where its hierarchy is closed
   */
  endorsement(): Promise<Endorsement>;
  /** Made in the chip, kept by the caller: what `attestationPublic` and the calls below take. Nothing in it is secret. */
  makeAttestationKey(enrolment: RootTpmEnrolment): Promise<Buffer>;
  /**
   * What the registers hold, signed.
   * @param attestationKey as `makeAttestationKey` gave it
   * @param qualifying 32 bytes that the verifier had a part in
   * @throws ManagerError `tpm-changed` where the key is another TPM's
   */
  quote(
    enrolment: RootTpmEnrolment,
    attestationKey: Uint8Array,
    pcrSelection: string,
    qualifying: Uint8Array,
  ): Promise<QuoteBytes>;
  /** What the revocation counter shows, signed. */
  certifyRevocation(
    enrolment: RootTpmEnrolment,
    attestationKey: Uint8Array,
    qualifying: Uint8Array,
  ): Promise<StatementBytes>;
  /**
   * The secret of a challenge: proof that the attestation key is in the chip of the endorsement key.
   * @throws ManagerError `peer-ek` where it was made for another one of the two
   */
  activateCredential(
    enrolment: RootTpmEnrolment,
    attestationKey: Uint8Array,
    credential: Credential,
  ): Promise<Buffer>;
  /**
   * A key for one secret from another host, bound to what the registers hold now.
   * @param qualifying 32 bytes that the attestation key's certification of it is over
   */
  makeImportKey(
    enrolment: RootTpmEnrolment,
    attestationKey: Uint8Array,
    pcrSelection: string,
    qualifying: Uint8Array,
  ): Promise<ImportKey>;
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
  return translated(
    async () => new OpenRootTpm(location, deadlineMs, await connectStarted(location, deadlineMs)),
  );
}

async function connectStarted(location: RootTpmLocation, deadlineMs: number): Promise<Tpm> {
  const tpm = await connect(location, deadlineMs);
  try {
    await start(tpm, location);
    // The embedded TPM has no other user: what is loaded was left by a manager that was killed.
    if (location.kind === 'embedded') await flushLeftovers(tpm);
    return tpm;
  } catch (error) {
    await tpm.close();
    throw error;
  }
}

async function connect(location: RootTpmLocation, deadlineMs: number): Promise<Tpm> {
  const transport =
    location.kind === 'device'
      ? await openDevice(location.path)
      : await openSocket(location.path, { connectTimeout: deadlineMs, deadline: deadlineMs });
  return createTpm(intercepted(transport, countCommand), { total: deadlineMs });
}

function countCommand({ responseCode }: ObservedExchange): void {
  metrics.tpmCommand.add();
  if (responseCode === 0) return;
  metrics.tpmError(responseCode === undefined ? 'none' : `0x${responseCode.toString(16).padStart(8, '0')}`);
}

const NO_PASSWORD = new Uint8Array(0);

class OpenRootTpm implements RootTpm {
  readonly #turns = new Turns();
  #tpm: Tpm | undefined;
  #isClosed = false;
  readonly #counters: SessionCounter[] = [];
  constructor(
    private readonly location: RootTpmLocation,
    private readonly deadlineMs: number,
    tpm: Tpm,
  ) {
    this.#tpm = tpm;
  }

  enrol(options: EnrolOptions): Promise<Enrolled> {
    return this.#inTurn((tpm) => enrol(tpm, this.location, options));
  }

  releaseRootKey(enrolment: RootTpmEnrolment, approvals: readonly Approval[] = []): Promise<Buffer> {
    return this.#inTurn((tpm) => releaseRootKey(tpm, enrolment, approvals));
  }

  nextGeneration(enrolment: RootTpmEnrolment, options: NextGenerationOptions = {}): Promise<NewGeneration> {
    return this.#inTurn((tpm) => nextGeneration(tpm, enrolment, options));
  }

  async eraseGeneration(
    enrolment: RootTpmEnrolment,
    old: RootGeneration,
    ownerAuth?: Uint8Array,
  ): Promise<Removal> {
    const [removal = 'gone'] = await this.eraseIndices(
      enrolment,
      [{ handle: old.nvHandle, name: old.nvName }],
      ownerAuth,
    );
    return removal;
  }

  eraseIndices(
    enrolment: RootTpmEnrolment,
    refs: readonly NvIndexRef[],
    ownerAuth: Uint8Array = NO_PASSWORD,
  ): Promise<Removal[]> {
    return this.#inTurn((tpm) => eraseIndices(tpm, enrolment, refs, ownerAuth));
  }

  readPlatformState(enrolment: RootTpmEnrolment, pcrSelection?: string): Promise<PlatformState> {
    return this.#inTurn((tpm) => readPlatformState(tpm, enrolment, pcrSelection));
  }

  readRevocationCounter(enrolment: RootTpmEnrolment): Promise<bigint> {
    return this.#inTurn((tpm) => readRevocation(tpm, enrolment));
  }

  incrementRevocationCounter(
    enrolment: RootTpmEnrolment,
    ownerAuth: Uint8Array = NO_PASSWORD,
  ): Promise<bigint> {
    return this.#inTurn((tpm) => incrementRevocation(tpm, enrolment, ownerAuth));
  }

  anchorCounter(enrolment: RootTpmEnrolment, anchorAuth: Uint8Array): AnchorCounter {
    checkEnrolmentFormat(enrolment);
    checkAnchorAuth(anchorAuth);
    const { orderlyCount } = enrolment.anchor;
    const counter = new SessionCounter(enrolment, anchorAuth);
    this.#counters.push(counter);
    const urgent = <T>(body: (tpm: Tpm) => Promise<T>): Promise<T> => this.#inTurn(body, true);
    return {
      read: () => urgent((tpm) => counter.read(tpm)),
      increment: (stated) => urgent((tpm) => counter.increment(tpm, stated)),
      ...(orderlyCount > 0 && {
        orderly: {
          // Part 1, "NV counters": the value after an unorderly reset is the end of the block that was begun.
          ahead: BigInt(orderlyCount) + 1n,
          resets: () => urgent((tpm) => counter.resets(tpm)),
          countTo: (value) => urgent((tpm) => counter.countTo(tpm, value)),
        },
      }),
    };
  }

  recreateAnchorCounter(
    enrolment: RootTpmEnrolment,
    anchorAuth: Uint8Array,
    options: RecreateOptions = {},
  ): Promise<RootTpmEnrolment> {
    return this.#inTurn((tpm) => recreateAnchorCounter(tpm, enrolment, anchorAuth, options));
  }

  withdraw(enrolment: RootTpmEnrolment, options: WithdrawOptions): Promise<Withdrawal> {
    return this.#inTurn((tpm) => withdraw(tpm, enrolment, options));
  }

  examine(enrolment: RootTpmEnrolment): Promise<TpmFacts> {
    return this.#inTurn((tpm) => examine(tpm, enrolment.srkHandle, enrolment));
  }

  endorsement(): Promise<Endorsement> {
    return this.#inTurn(readEndorsement);
  }

  makeAttestationKey(enrolment: RootTpmEnrolment): Promise<Buffer> {
    return this.#inTurn((tpm) => makeAttestationKey(tpm, enrolment));
  }

  quote(
    enrolment: RootTpmEnrolment,
    attestationKey: Uint8Array,
    pcrSelection: string,
    qualifying: Uint8Array,
  ): Promise<QuoteBytes> {
    return this.#inTurn((tpm) => quote(tpm, enrolment, attestationKey, pcrSelection, qualifying));
  }

  certifyRevocation(
    enrolment: RootTpmEnrolment,
    attestationKey: Uint8Array,
    qualifying: Uint8Array,
  ): Promise<StatementBytes> {
    return this.#inTurn((tpm) => certifyRevocation(tpm, enrolment, attestationKey, qualifying));
  }

  activateCredential(
    enrolment: RootTpmEnrolment,
    attestationKey: Uint8Array,
    credential: Credential,
  ): Promise<Buffer> {
    return this.#inTurn((tpm) => activateCredential(tpm, enrolment, attestationKey, credential));
  }

  makeImportKey(
    enrolment: RootTpmEnrolment,
    attestationKey: Uint8Array,
    pcrSelection: string,
    qualifying: Uint8Array,
  ): Promise<ImportKey> {
    const inTurn = <T>(body: (tpm: Tpm) => Promise<T>): Promise<T> => this.#inTurn(body);
    return makeImportKey(inTurn, enrolment, attestationKey, pcrSelection, qualifying);
  }

  async close(): Promise<void> {
    await this.#turns.idle();
    this.#isClosed = true;
    for (const counter of this.#counters) counter.close();
    await this.#tpm?.close();
  }

  // Two at once would need more sessions and objects than a chip has room for.
  #inTurn<T>(body: (tpm: Tpm) => Promise<T>, isUrgent = false): Promise<T> {
    return this.#turns.take(
      () =>
        translated(async () => {
          if (this.#isClosed) throw new TpmError('usage', 'the connection to the root TPM was closed');
          this.#tpm ??= await connectStarted(this.location, this.deadlineMs);
          try {
            return await body(this.#tpm);
          } catch (error) {
            if (isLost(error)) {
              const lost = this.#tpm;
              this.#tpm = undefined;
              await lost.close();
            }
            throw error;
          }
        }),
      isUrgent,
    );
  }
}

/** A transport that failed once is not used again. */
function isLost(error: unknown): boolean {
  return error instanceof TpmError && error.code === 'transport';
}
