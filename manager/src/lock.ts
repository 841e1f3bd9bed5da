import { closeSync } from 'node:fs';
import { lockFile, type Paths } from 'vtpm-common';
import { ManagerError } from './error.js';

/** One manager at a time on an installation. @returns the function that lets go @throws ManagerError `in-use` */
export function acquireLock(paths: Paths['manager']): () => void {
  const fd = lockFile(paths.lock);
  if (fd === undefined) {
    throw new ManagerError(
      'in-use',
      `another vtpm-managerd runs on ${paths.directory}; stop it, or choose another --home`,
    );
  }
  return () => closeSync(fd);
}
