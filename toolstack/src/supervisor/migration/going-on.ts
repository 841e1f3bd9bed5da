import { isWithin } from '../is-within.js';
import type { VtpmStatus } from '../vtpm-status.js';

/** How long whoever asks waits for the worker that goes on: it comes when the manager lets it, and a stop may be wanted before. */
const LIMIT_MS = 10_000;

/**
 * The entry says that only the manager knows until the vTPM goes on, or will not.
 * @param goesOn when that is
 */
export async function whenItGoesOn(
  status: Pick<VtpmStatus, 'entry' | 'tryUpdate'>,
  goesOn: Promise<void>,
): Promise<void> {
  const migration = status.entry.migration?.id;
  const settled = goesOn.then(() => {
    if (status.entry.migration?.id === migration) status.tryUpdate({ migration: null });
  });
  await isWithin(settled, LIMIT_MS);
}
