import {
  commandCode,
  HEADER_BYTES,
  hasSessions,
  responseCode,
  TPM_CC,
  TPM_RC_SUCCESS,
} from '../engine/command.js';

/**
 * Commands that leave the TPM as it was. Each only reads: PCRs, capabilities, public areas, fixed parameters. GetRandom
 * moves the random generator on, but a worker that goes on from a checkpoint stirs it with fresh bytes, so no number
 * comes twice. Not here: ReadClock, whose answer must never be followed by a smaller one.
 */
const READS: ReadonlySet<number> = new Set([
  TPM_CC.GetRandom,
  TPM_CC.GetCapability,
  TPM_CC.PCR_Read,
  TPM_CC.ReadPublic,
  TPM_CC.NV_ReadPublic,
  TPM_CC.TestParms,
  TPM_CC.ECC_Parameters,
  TPM_CC.GetTestResult,
]);

/**
 * Tells commands after which no checkpoint is needed: the one before still says all there is, and what repeats such a
 * command gives an answer that is as good. Without sessions, because those have counters and nonces of their own, and only
 * where it succeeded: a failure may be counted. A command that is audited (part 1, section 32) changes the audit digest,
 * so the TPM must have been asked which ones are: `takeQuestion`.
 */
export class NoEffect {
  #isAudited: boolean | undefined;
  /** How often the answer may have changed. */
  #changes = 1;
  #asked = 0;

  /** For `answered`, once for each time that the answer may have changed. */
  takeQuestion(): number | undefined {
    if (this.#asked === this.#changes) return undefined;
    this.#asked = this.#changes;
    return this.#asked;
  }

  /** Another TPM state is in place. */
  forget(): void {
    this.#isAudited = undefined;
    this.#changes++;
  }

  /** @param response to TPM2_GetCapability of TPM_CAP_AUDIT_COMMANDS, of which it wants all */
  answered(question: number, response: Buffer): void {
    if (question === this.#changes) this.#isAudited = auditsRead(response);
  }

  /** Whether the command, which ran and stored nothing, left the TPM as it was. */
  covers(command: Buffer, response: Buffer): boolean {
    const code = commandCode(command);
    if (code === TPM_CC.SetCommandCodeAuditStatus || code === TPM_CC.Startup) {
      this.forget();
      return false;
    }
    return (
      this.#isAudited === false &&
      READS.has(code) &&
      !hasSessions(command) &&
      responseCode(response) === TPM_RC_SUCCESS
    );
  }
}

/** TPMS_CAPABILITY_DATA behind the header and moreData: u32 capability, u32 count, u32 command codes. */
function auditsRead(response: Buffer): boolean | undefined {
  const start = HEADER_BYTES + 9;
  if (responseCode(response) !== TPM_RC_SUCCESS || response.length < start) return undefined;
  const count = response.readUInt32BE(start - 4);
  if (response.length < start + 4 * count) return undefined;
  for (let index = 0; index < count; index++) {
    if (READS.has(response.readUInt32BE(start + 4 * index))) return true;
  }
  return false;
}
