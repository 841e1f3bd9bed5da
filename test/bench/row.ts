import type { Spread } from './statistics.js';

/** One line of the benchmark. `name` stays the same from version to version. */
export interface Row {
  readonly name: string;
  readonly unit: string;
  readonly ours: Spread;
  /** What it is compared with; null for a figure that stands alone. */
  readonly peer: (Spread & { readonly name: string }) | null;
  /** p50 of ours over p50 of the peer. */
  readonly ratio: number | null;
  readonly note: string;
}

/** How long each measurement takes. */
export interface Effort {
  readonly rounds: number;
  /** Starts of a vTPM, for each side. */
  readonly starts: number;
  /** vTPMs that are up at once. */
  readonly crowd: number;
  readonly warmUpSeconds: number;
  readonly windowSeconds: number;
}

export interface RowContext {
  readonly effort: Effort;
  wanted(name: string): boolean;
  report(row: Row): void;
}

/** Rows that share a set-up. */
export interface Suite {
  readonly names: readonly string[];
  run(context: RowContext): Promise<void>;
}

export function row(
  name: string,
  unit: string,
  ours: Spread,
  peer: (Spread & { name: string }) | null = null,
  note = '',
): Row {
  return { name, unit, ours, peer, ratio: peer && peer.p50 > 0 ? ours.p50 / peer.p50 : null, note };
}
