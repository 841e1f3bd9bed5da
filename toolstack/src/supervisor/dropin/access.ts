import { createHash, timingSafeEqual } from 'node:crypto';
import { ToolstackError } from '../../error.js';
import type { Entry } from '../entry.js';
import type { PlacedToken } from './protocol.js';

/** Root and the supervisor's own user. */
export function isTrusted(uid: number): boolean {
  return uid === 0 || uid === process.getuid?.();
}

/**
 * Whether who shows this token may start the vTPM of that entry: the token is the newest one, in the place that it was made for,
 * and the caller is who it was made for, or root.
 * @throws ToolstackError `token-refused` | `not-permitted`
 */
export function checkToken(entry: Entry, { secret, vmUuid, place }: PlacedToken, uid: number): void {
  const { dropin } = entry;
  const isPermitted = uid === dropin?.uid || isTrusted(uid);
  // Names are told to those only whose vTPM it is.
  const name = isPermitted ? entry.name : entry.id;
  const again = `vtpmctl dropin ${name} ${place} makes a new token there`;
  if (!dropin) {
    throw new ToolstackError('token-refused', `vTPM ${name} is not started by swtpm; ${again}`);
  }
  const digest = createHash('sha256').update(Buffer.from(secret, 'hex')).digest();
  if (!timingSafeEqual(digest, Buffer.from(dropin.secretSha256, 'hex'))) {
    throw new ToolstackError('token-refused', `the token in ${place} is not that of vTPM ${name}; ${again}`);
  }
  if (!isPermitted) {
    throw new ToolstackError(
      'not-permitted',
      `the token of vTPM ${name} is for user ${dropin.uid}, not for user ${uid}; ${again}`,
    );
  }
  if (vmUuid !== entry.vmUuid) {
    throw new ToolstackError(
      'token-refused',
      `vTPM ${name} belongs to VM ${entry.vmUuid}, not to ${vmUuid}; for that VM make another vTPM in a directory of its own`,
    );
  }
  if (place !== dropin.place) {
    throw new ToolstackError(
      'token-refused',
      `${place} holds a copy of the token of vTPM ${name}, which is in ${dropin.place}: a copied directory is not a second TPM; where it was moved, ${again}`,
    );
  }
}
