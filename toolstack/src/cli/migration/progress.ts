import { bytes } from '../output.js';

export type MigratePhase =
  | 'CONNECTING'
  | 'ATTESTING'
  | 'PREPARING'
  | 'PREPARED'
  | 'FREEZING'
  | 'FROZEN'
  | 'SENDING'
  | 'DECIDING'
  | 'COMMITTED'
  | 'ABORTED'
  | 'IN_DOUBT';

/** A line of the supervisor's answer to an order: MigrateProgress of the managers' protocol. */
export interface MigrateProgress {
  readonly phase: MigratePhase;
  readonly bytesSent: number;
  readonly bytesTotal: number;
  /** Since the freeze. */
  readonly downtimeUs: number;
  readonly elapsedUs: number;
  readonly reason: string;
  readonly message: string;
  /** Of a dry run. */
  readonly checks: readonly { readonly name: string; readonly detail: string }[];
}

/** What each phase is to an operator, and how far it is. */
const PHASES: Readonly<Record<MigratePhase, readonly [string, number]>> = {
  CONNECTING: ['connecting', 0.02],
  ATTESTING: ['both hosts show their platform', 0.1],
  PREPARING: ['the destination makes itself ready', 0.25],
  PREPARED: ['ready', 0.4],
  FREEZING: ['freezing between two commands', 0.45],
  FROZEN: ['frozen', 0.5],
  SENDING: ['sending', 0.55],
  DECIDING: ['the destination decides', 0.95],
  COMMITTED: ['migrated', 1],
  ABORTED: ['not migrated', 1],
  IN_DOUBT: ['in doubt', 1],
};
const SENDING_SHARE = 0.35;
const BAR_WIDTH = 24;

/** One line, without its end. */
export function sayProgress(progress: MigrateProgress): string {
  const { phase, bytesSent, bytesTotal, downtimeUs } = progress;
  const parts = [PHASES[phase][0]];
  if (bytesTotal > 0) parts.push(`${bytes(bytesSent)} of ${bytes(bytesTotal)}`);
  if (downtimeUs > 0) parts.push(`stopped for ${duration(downtimeUs)}`);
  return parts.join(', ');
}

/** The same with a bar before it, for a terminal of so many columns. */
export function progressBar(name: string, progress: MigrateProgress, columns: number): string {
  const { phase, bytesSent, bytesTotal } = progress;
  const sent = phase === 'SENDING' && bytesTotal > 0 ? (bytesSent / bytesTotal) * SENDING_SHARE : 0;
  const done = Math.round(Math.min(1, PHASES[phase][1] + sent) * BAR_WIDTH);
  const bar = `${'#'.repeat(done)}${'.'.repeat(BAR_WIDTH - done)}`;
  return `${name} [${bar}] ${sayProgress(progress)}`.slice(0, Math.max(columns - 1, 20));
}

/** Microseconds, for people. */
export function duration(us: number): string {
  return us < 999_500 ? `${Math.round(us / 1000)} ms` : `${(us / 1_000_000).toFixed(2)} s`;
}

export function isLast({ phase }: MigrateProgress): boolean {
  return phase === 'COMMITTED' || phase === 'ABORTED' || phase === 'IN_DOUBT';
}

/** Where the progress of one migration is shown while it lasts; the last line of it is the command's result. */
export interface ProgressView {
  show(progress: MigrateProgress): void;
  /** Something is said beside it. */
  say(text: string): void;
  /** What was shown last is taken away, so that the result stands in its place. */
  end(): void;
}

/** On a terminal one line that changes; otherwise a line for each phase. */
export function progressView(
  name: string,
  stderr: Pick<NodeJS.WriteStream, 'write' | 'isTTY' | 'columns'>,
): ProgressView {
  if (stderr.isTTY !== true) {
    let last: MigratePhase | undefined;
    return {
      show: (progress) => {
        if (progress.phase !== last && !isLast(progress)) stderr.write(`${name}: ${sayProgress(progress)}\n`);
        last = progress.phase;
      },
      say: (text) => stderr.write(`${text}\n`),
      end: () => undefined,
    };
  }
  const clear = '\r\x1b[K';
  return {
    show: (progress) =>
      stderr.write(`${clear}${progressBar(name, progress, stderr.columns > 0 ? stderr.columns : 80)}`),
    say: (text) => stderr.write(`${clear}${text}\n`),
    end: () => stderr.write(clear),
  };
}
