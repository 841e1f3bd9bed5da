import type { MigratePhase, MigrateProgress } from 'vtpm-proto';
import { ToolstackError } from '../../error.js';

/** A line of the answer to an order. */
export interface ProgressLine {
  readonly phase: MigratePhase;
  readonly bytesSent: number;
  readonly bytesTotal: number;
  /** Microseconds since the freeze, and in all. */
  readonly downtimeUs: number;
  readonly elapsedUs: number;
  /** Why it ended so: by name, and a sentence. */
  readonly reason: string;
  readonly message: string;
  /** Of a dry run. */
  readonly checks: readonly { readonly name: string; readonly detail: string }[];
}

export function lineOf(progress: MigrateProgress): ProgressLine {
  const { phase, bytesSent, bytesTotal, downtimeUs, elapsedUs, reason, message, checks } = progress;
  return {
    phase,
    bytesSent: Number(bytesSent),
    bytesTotal: Number(bytesTotal),
    downtimeUs: Number(downtimeUs),
    elapsedUs: Number(elapsedUs),
    ...{ reason, message },
    checks: checks.map(({ name, detail }) => ({ name, detail })),
  };
}

/** The last line where the manager did not say it. */
export function inDoubt(last: ProgressLine | undefined, unknown: unknown): ProgressLine {
  const { code, message } = ToolstackError.from(unknown);
  const numbers = { bytesSent: 0, bytesTotal: 0, downtimeUs: 0, elapsedUs: 0, checks: [], ...last };
  return { ...numbers, phase: 'IN_DOUBT', reason: code, message };
}
