import { ManagerError } from '../error.js';

/** @throws ManagerError `bad-request` where one has another length than it must */
export function checkLengths(
  message: string,
  fields: readonly (readonly [name: string, bytes: Uint8Array, length: number])[],
): void {
  for (const [name, { length: found }, length] of fields) {
    if (found !== length) {
      throw new ManagerError(
        'bad-request',
        `the ${name} of the ${message} has ${found} bytes, not ${length}`,
      );
    }
  }
}
