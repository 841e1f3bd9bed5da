import type { Logger, Paths } from 'vtpm-common';
import { ManagerError } from './error.js';
import { openRootTpm, type RootTpm, type RootTpmLocation } from './root-tpm/index.js';
import { type SoftTpmProcess, startSoftTpm } from './softtpm-process.js';

/** The root TPM, with the process behind it where it is the embedded one. */
export interface Platform {
  readonly tpm: RootTpm;
  close(): Promise<void>;
}

export const NOT_HARDWARE_PROTECTED =
  'the root TPM is the embedded one, software on the same disk: nothing is hardware-protected, neither theft of the disk nor putting back an old one is noticed';

/**
 * @param create only where init makes the embedded TPM
 * @param deadlineMs as openRootTpm has it
 */
export async function openPlatform(
  location: RootTpmLocation,
  paths: Paths['manager'],
  log: Logger,
  create: boolean,
  deadlineMs: number,
): Promise<Platform> {
  let process: SoftTpmProcess | undefined;
  let place = location;
  if (location.kind === 'embedded') {
    log.warn(NOT_HARDWARE_PROTECTED);
    // Where it was at enrolment is no matter: it goes with the installation.
    place = { kind: 'embedded', path: paths.softtpmSocket };
    process = await startSoftTpm({ state: paths.softtpm, socket: place.path, create, log });
  }
  try {
    const tpm = await openRootTpm(place, deadlineMs);
    return {
      tpm,
      close: async () => {
        await tpm.close();
        await process?.stop();
      },
    };
  } catch (error) {
    await process?.stop();
    throw error;
  }
}

/** `device:PATH`, `unix:PATH` or `embedded`. @throws ManagerError `bad-request` */
export function parseTpm(text: string, paths: Paths['manager']): RootTpmLocation {
  if (text === 'embedded') return { kind: 'embedded', path: paths.softtpmSocket };
  const match = /^(device|unix):(\/.*)$/.exec(text);
  const [, kind, path] = match ?? [];
  if ((kind !== 'device' && kind !== 'unix') || path === undefined) {
    throw new ManagerError(
      'bad-request',
      `--tpm is auto, device:/dev/tpmrm0, unix:/absolute/path or embedded, not "${text}"`,
    );
  }
  return { kind, path };
}
