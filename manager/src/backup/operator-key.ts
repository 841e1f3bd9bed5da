import { boxKeyPair } from 'vtpm-proto';
import { ManagerError } from '../error.js';
import { wipe } from '../keys/index.js';

/** So that a file or a line of paper says what it is. */
const SECRET_PREFIX = 'vtpm-backup-secret-1-';
const PUBLIC_PREFIX = 'vtpm-backup-public-1-';

/** A new key of the operator, to whom backups are encrypted: both halves as text. */
export function newBackupKey(): { readonly secret: string; readonly public: string } {
  const { publicKey, secretKey } = boxKeyPair();
  const secret = SECRET_PREFIX + Buffer.from(secretKey).toString('hex');
  wipe(secretKey);
  return { secret, public: backupPublicText(publicKey) };
}

/** @param publicKey 32 bytes */
export function backupPublicText(publicKey: Uint8Array): string {
  return PUBLIC_PREFIX + Buffer.from(publicKey).toString('hex');
}

/** The public half, 32 bytes. @throws ManagerError `bad-request` */
export function parseBackupPublic(text: string): Buffer {
  return keyOf(text, PUBLIC_PREFIX, 'the public half of a backup key');
}

/** The private half, 32 bytes; the caller wipes it. @throws ManagerError `bad-request` */
export function parseBackupSecret(text: string): Buffer {
  return keyOf(text, SECRET_PREFIX, 'the private half of a backup key');
}

function keyOf(text: string, prefix: string, what: string): Buffer {
  const trimmed = text.trim();
  const hex = trimmed.startsWith(prefix) ? trimmed.slice(prefix.length) : '';
  if (!/^[0-9a-f]{64}$/.test(hex)) {
    throw new ManagerError(
      'bad-request',
      `${what} is ${prefix} and 64 hex digits, as vtpmctl backup keygen wrote it`,
    );
  }
  return Buffer.from(hex, 'hex');
}
