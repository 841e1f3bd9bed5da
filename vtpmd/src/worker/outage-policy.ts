import {
  commandCode,
  hasSessions,
  isWrongAuthorisation,
  responseCode,
  TPM_CC,
  TPM_RC_SUCCESS,
} from '../engine/command.js';
import { VtpmdError } from '../error.js';
import type { CommandSource } from './command-source.js';

/** Who waits for an answer, where it matters how long. */
export type ClientKind = 'tpm' | 'tcti' | 'vmm-data';

/**
 * How long a command is held, in milliseconds, before it is tried while the manager is away. tpm2-tss sends a command
 * five times in a row, without a pause, while it hears TPM_RC_RETRY: the hold is the pause. One VMM, Cloud Hypervisor, gives
 * up on an answer after 100 ms.
 */
export const HOLD_MS: HoldTimes = {
  tpm: 400,
  tcti: 400,
  'vmm-data': 80,
  power: 10_000,
};

/** What a hold may be set to. */
const HOLD_RANGE_MS = [10, 60_000] as const;

/** `power`: how long a power-on that a VMM asks for waits; its VM stands still meanwhile. */
export type HoldTimes = Readonly<Record<ClientKind | 'power', number>>;

/** Reads `outage` of the supervisor's `identity` message; what it does not name keeps its default. @throws VtpmdError `protocol` */
export function readHoldTimes(outage: unknown): HoldTimes {
  const times = { ...HOLD_MS };
  if (outage === undefined) return times;
  const { holdMs } = (outage ?? {}) as { holdMs?: unknown };
  if (typeof holdMs !== 'object' || holdMs === null) {
    throw new VtpmdError('protocol', 'the outage settings have no hold times');
  }
  for (const [kind, value] of Object.entries(holdMs)) {
    if (!Object.hasOwn(times, kind)) {
      throw new VtpmdError('protocol', `a hold time for an unknown kind of client: "${kind.slice(0, 40)}"`);
    }
    const [least, most] = HOLD_RANGE_MS;
    if (!Number.isInteger(value) || Number(value) < least || Number(value) > most) {
      throw new VtpmdError('protocol', `the hold time of ${kind} is not from ${least} to ${most} ms`);
    }
    times[kind as keyof HoldTimes] = Number(value);
  }
  return times;
}

/** Which commands may be tried while the manager is away, and when. */
export class OutagePolicy {
  readonly #holdMs: HoldTimes;
  readonly #startedByGuest: boolean;
  #isFirmware: boolean;
  #wasAuthorisationWrong = false;

  /**
   * @param startedByGuest TPM2_Startup is left to the guest, so its first client is firmware. Where the worker sends it,
   * all clients are programs under an operating system.
   */
  constructor(holdMs: HoldTimes, startedByGuest: boolean) {
    this.#holdMs = holdMs;
    this.#startedByGuest = startedByGuest;
    this.#isFirmware = startedByGuest;
  }

  /** Firmware drives the TPM. */
  get isFirmware(): boolean {
    return this.#isFirmware;
  }

  /** Takes over what a worker before this one knew. */
  restore(isFirmware: boolean): void {
    this.#isFirmware = isFirmware;
  }

  /** A new outage. */
  begin(): void {
    this.#wasAuthorisationWrong = false;
  }

  /** Milliseconds until the command may be tried; Infinity: it waits for the manager. */
  holdTime(source: CommandSource): number {
    if (!this.mayTry(source.command)) return Number.POSITIVE_INFINITY;
    // The worker's own commands make room in the TPM, and nobody hears their answers.
    return source.kind === undefined ? 0 : this.#holdMs[source.kind];
  }

  mayTry(command: Buffer): boolean {
    const code = commandCode(command);
    if (this.#isFirmware || code === TPM_CC.Startup || code === TPM_CC.Shutdown) return false;
    return !(this.#wasAuthorisationWrong && hasSessions(command));
  }

  /**
   * Takes note of a command that ran. Firmware may boot unmeasured when it is answered with anything but success, where
   * an operating system tries again, so it counts which of the two drives the TPM. No command says so outright. The
   * resource managers of operating systems save and load contexts and firmware does not, so an operating system is taken
   * to run from the first of these on, until the next Startup or Shutdown.
   */
  ran(command: Buffer, response: Buffer): void {
    if (!this.#startedByGuest) return;
    const code = commandCode(command);
    if (code === TPM_CC.Startup || code === TPM_CC.Shutdown) this.#isFirmware = true;
    else if (this.#isFirmware && (code === TPM_CC.ContextSave || code === TPM_CC.ContextLoad)) {
      this.#isFirmware = responseCode(response) !== TPM_RC_SUCCESS;
    }
  }

  /**
   * Takes note of a command that was undone, with the answer that nobody got. Where that says that an authorisation was
   * wrong, what was stored is the count of wrong tries: undone, and told apart from a right one by its RETRY, such a
   * command would be a free guess. So it waits, to be counted when the manager is back, and until then no other command
   * with an authorisation is tried.
   * @returns whether the command must wait
   */
  undone(response: Buffer): boolean {
    if (!isWrongAuthorisation(responseCode(response))) return false;
    this.#wasAuthorisationWrong = true;
    return true;
  }
}
