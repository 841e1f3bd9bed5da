import { koffi } from './libc.js';

/** Of every program of this project. */
export const VERSION = '0.1.0';

/**
 * The system's libtpms as MAJOR.MINOR.PATCH. @throws Error that names the package to install
 */
export function libtpmsVersion(): string {
  const path = 'libtpms.so.0';
  let number: number;
  try {
    number = Number(koffi.load(path, { deep: true }).func('uint32_t TPMLIB_GetVersion(void)')());
  } catch (cause) {
    throw new Error(`${path} is not installed; on Debian: apt-get install libtpms0`, { cause });
  }
  return `${(number >> 16) & 0xff}.${(number >> 8) & 0xff}.${number & 0xff}`;
}
