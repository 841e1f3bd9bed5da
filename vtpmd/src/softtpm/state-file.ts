import { createHash } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { writeFileDurably } from 'vtpm-common/files';
import { VtpmdError } from '../error.js';

/**
 * The permanent state of the embedded TPM in one file. 48 bytes of header: magic (8), u32 format, u32 length of the
 * state (both big-endian), SHA-256 of the state; then the state. libtpms's own blob has no check of its content. The
 * digest finds damage, not tampering: who can write the file can make a new digest.
 */
const MAGIC = Buffer.from('vtpmsoft');
const FORMAT = 1;
const HEADER_BYTES = 48;

export function stateFilePath(directory: string): string {
  return join(directory, 'state');
}

/** @returns undefined where there is no file. @throws VtpmdError `state-corrupt`, `newer-format` */
export function readStateFile(path: string): Buffer | undefined {
  let content: Buffer;
  try {
    content = readFileSync(path);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return undefined;
    throw new VtpmdError('state-corrupt', `${path} cannot be read: ${(error as Error).message}`, {
      cause: error,
    });
  }
  if (content.length < HEADER_BYTES || !content.subarray(0, 8).equals(MAGIC)) {
    throw new VtpmdError(
      'state-corrupt',
      `${path} is not the state of an embedded TPM; restore it from a backup`,
    );
  }
  const format = content.readUInt32BE(8);
  if (format > FORMAT) {
    throw new VtpmdError(
      'newer-format',
      `${path} has format ${format}, this version knows ${FORMAT}; upgrade this program`,
    );
  }
  const state = content.subarray(HEADER_BYTES);
  const digest = createHash('sha256').update(state).digest();
  if (
    format !== FORMAT ||
    content.readUInt32BE(12) !== state.length ||
    !digest.equals(content.subarray(16, 48))
  ) {
    throw new VtpmdError('state-corrupt', `${path} is damaged; restore it from a backup`);
  }
  return state;
}

/** Durable when it returns. */
export function writeStateFile(path: string, state: Uint8Array): void {
  const header = Buffer.alloc(HEADER_BYTES);
  header.set(MAGIC, 0);
  header.writeUInt32BE(FORMAT, 8);
  header.writeUInt32BE(state.length, 12);
  header.set(createHash('sha256').update(state).digest(), 16);
  writeFileDurably(path, Buffer.concat([header, state]));
}
