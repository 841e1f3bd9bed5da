import { ManagerError } from '../error.js';

/** @param whose for the message @throws ManagerError `peer-late`; what `work` began goes on by itself */
export async function within<T>(work: Promise<T>, limitMs: number, whose: string): Promise<T> {
  let timer: NodeJS.Timeout | undefined;
  // Who waits no longer does not hear of its failure.
  work.catch(() => undefined);
  try {
    return await Promise.race([
      work,
      new Promise<never>((_, reject) => {
        timer = setTimeout(() => {
          reject(
            new ManagerError('peer-late', `${whose} did not answer within ${Math.ceil(limitMs / 1000)} s`),
          );
        }, limitMs);
      }),
    ]);
  } finally {
    clearTimeout(timer);
  }
}
