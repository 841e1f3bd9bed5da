import { statfsSync } from 'node:fs';

const MIB = 2 ** 20;

/** Room on a file system that is kept for saves: a new vTPM is no reason to use it. */
export interface SpaceShortage {
  readonly path: string;
  readonly freeMiB: number;
  readonly reserveMiB: number;
}

/**
 * @param reserveMiB 0: nothing is kept
 * @returns undefined while there is more free space (for this user) on the file system of `path` than the reserve
 * @throws where `path` cannot be looked at
 */
export function spaceShortage(path: string, reserveMiB: number): SpaceShortage | undefined {
  if (reserveMiB === 0) return undefined;
  const { bavail, bsize } = statfsSync(path);
  const free = bavail * bsize;
  return free < reserveMiB * MIB ? { path, freeMiB: Math.floor(free / MIB), reserveMiB } : undefined;
}

/** What a caller is told whose new vTPM is refused. */
export function shortageText({ path, freeMiB, reserveMiB }: SpaceShortage): string {
  return (
    `the disk of ${path} has ${freeMiB} MiB free and keeps ${reserveMiB} MiB for the vTPMs there are: ` +
    'make room, or lower store-reserve'
  );
}
