/** The two figures of a row's side, in the row's unit. */
export interface Spread {
  readonly p50: number;
  readonly p99: number;
}

/** The value that `share` of the values are not above (nearest rank). */
export function percentile(values: readonly number[], share: number): number {
  if (values.length === 0) throw new Error('no values');
  const sorted = [...values].sort((a, b) => a - b);
  return sorted[Math.max(0, Math.ceil(share * sorted.length) - 1)]!;
}

export function median(values: readonly number[]): number {
  return percentile(values, 0.5);
}

/**
 * Sides measured in turn, so that whatever else the machine does falls on all of them. p50 is the median of the rounds'
 * medians; p99 is over all values, because a round has too few for one.
 */
export async function interleaved(
  rounds: number,
  sides: readonly (() => number[] | Promise<number[]>)[],
): Promise<Spread[]> {
  const medians = sides.map((): number[] => []);
  const all = sides.map((): number[] => []);
  for (let round = 0; round < rounds; round++) {
    const order = sides.map((_, index) => (round % 2 === 0 ? index : sides.length - 1 - index));
    for (const index of order) {
      const values = await sides[index]!();
      medians[index]!.push(median(values));
      for (const value of values) all[index]!.push(value);
    }
  }
  return sides.map((_, index) => ({ p50: median(medians[index]!), p99: percentile(all[index]!, 0.99) }));
}
