import { readdirSync } from 'node:fs';
import { ManagerError } from '../error.js';
import { RECORD_FORMAT } from '../records/index.js';

/** Of this protocol, both inclusive. An older one is spoken only as long as it is in this range. */
export const LEAST_VERSION = 1;
export const MOST_VERSION = 1;

const VERSION = /^(\d{1,5})\.(\d{1,5})\.(\d{1,5})$/;

/**
 * The newest version of the protocol that both ends speak.
 * @throws ManagerError `incompatible`
 */
export function commonVersion(other: { readonly least: number; readonly most: number }): number {
  const version = Math.min(other.most, MOST_VERSION);
  if (version < Math.max(other.least, LEAST_VERSION)) {
    throw new ManagerError(
      'incompatible',
      `the other host speaks versions ${other.least} to ${other.most} of the migration protocol, this one ${LEAST_VERSION} to ${MOST_VERSION}; upgrade the older one`,
    );
  }
  return version;
}

/**
 * State goes forward only: libtpms reads what an older one wrote, and not the other way round.
 * @param state version of the libtpms that wrote the state
 * @param destination of the one that is to read it
 * @throws ManagerError `incompatible`
 */
export function checkLibtpms(state: string, destination: string): void {
  const [wrote, reads] = [parse(state), parse(destination)];
  if (!wrote || !reads) {
    throw new ManagerError(
      'incompatible',
      `the version of libtpms is not known (state "${state.slice(0, 64)}", destination "${destination.slice(0, 64)}"); install libtpms on the destination, and start the vTPM once where the state is`,
    );
  }
  if (compare(wrote, reads) > 0) {
    throw new ManagerError(
      'incompatible',
      `the state was written by libtpms ${state}, the destination has ${destination}; upgrade libtpms there`,
    );
  }
}

/** @param other record format of the other end @throws ManagerError `incompatible` */
export function checkFormats(source: number, destination: number): void {
  if (source <= destination) return;
  throw new ManagerError(
    'incompatible',
    `the source writes records of format ${source}, the destination knows ${destination}; upgrade the destination`,
  );
}

export const OWN_RECORD_FORMAT = RECORD_FORMAT;

/** Where distributions put shared libraries. */
const LIBRARY_DIRECTORIES = [
  '/usr/lib/x86_64-linux-gnu',
  '/usr/lib/aarch64-linux-gnu',
  '/lib64',
  '/usr/lib64',
  '/usr/lib',
  '/usr/local/lib',
];

/**
 * The newest libtpms that is installed on this host, by the names of its files: the manager does not load it. Empty where
 * there is none.
 */
export function installedLibtpms(directories: readonly string[] = LIBRARY_DIRECTORIES): string {
  const found = directories
    .flatMap((directory) => namesIn(directory))
    .flatMap((name) => /^libtpms\.so\.(\d+\.\d+\.\d+)$/.exec(name)?.[1] ?? [])
    .sort((a, b) => compare(parse(b) ?? [], parse(a) ?? []));
  return found[0] ?? '';
}

function namesIn(directory: string): string[] {
  try {
    return readdirSync(directory);
  } catch {
    return [];
  }
}

function parse(version: string): number[] | undefined {
  return VERSION.exec(version)?.slice(1).map(Number);
}

function compare(a: readonly number[], b: readonly number[]): number {
  for (const [i, part] of a.entries()) {
    const difference = part - (b[i] ?? 0);
    if (difference !== 0) return difference;
  }
  return 0;
}
