import { ManagerError } from '../error.js';
import { within } from './within.js';

/** @throws ManagerError `migration-aborted` */
export function throwIfCancelled(signal: AbortSignal): void {
  if (signal.aborted) throw cancelled();
}

/**
 * As `within`, and ends also when the order is taken back.
 * @param onLate for what comes when nobody waits for it any more
 * @throws ManagerError `migration-aborted`, `peer-late`
 */
export async function unlessCancelled<T>(
  signal: AbortSignal,
  work: Promise<T>,
  limitMs: number,
  whose: string,
  onLate: (late: T) => void = () => undefined,
): Promise<T> {
  let isOver = signal.aborted;
  // Whoever waits for it no longer does not hear of its failure either.
  work.then((late) => isOver && onLate(late)).catch(() => undefined);
  throwIfCancelled(signal);
  let stop: (() => void) | undefined;
  const stopped = new Promise<never>((_, reject) => {
    stop = () => reject(cancelled());
    signal.addEventListener('abort', stop, { once: true });
  });
  try {
    return await Promise.race([within(work, limitMs, whose), stopped]);
  } finally {
    isOver = true;
    if (stop) signal.removeEventListener('abort', stop);
  }
}

function cancelled(): ManagerError {
  return new ManagerError('migration-aborted', 'the migration was cancelled; the vTPM stays here');
}
