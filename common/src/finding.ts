/** `ok`: as it should be. `note`: worth knowing. `warning`: works, with less safety. `problem`: does not work. */
export const FINDING_LEVELS = ['ok', 'note', 'warning', 'problem'] as const;
export type FindingLevel = (typeof FINDING_LEVELS)[number];

/** What a check of the host found. */
export interface Finding {
  /** What was looked at, stable for programs: `tpm-srk`, `swap`. */
  readonly check: string;
  readonly level: FindingLevel;
  /** One sentence, without a full stop. */
  readonly message: string;
  /** The command that mends it; null where there is nothing to mend, or no command for it. */
  readonly fix: string | null;
}

export function finding(
  check: string,
  level: FindingLevel,
  message: string,
  fix: string | null = null,
): Finding {
  return { check, level, message, fix };
}
