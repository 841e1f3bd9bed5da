import { createPrivateKey } from 'node:crypto';
import { closeSync, fsyncSync, openSync, readFileSync, rmSync, writeSync } from 'node:fs';
import { dirname } from 'node:path';
import { syncDirectory } from 'vtpm-common';
import { ToolstackError } from '../error.js';

/** Files that an operator names on the command line. Whatever is wrong with one is wrong usage, and says which flag it is. */

/** @throws ToolstackError `usage` */
export function readGivenFile(flag: string, path: string): string {
  let content: string;
  try {
    content = readFileSync(path, 'utf8');
  } catch (cause) {
    throw new ToolstackError('usage', `${flag}: ${(cause as Error).message}`, { cause });
  }
  if (content !== '') return content;
  throw new ToolstackError('usage', `${flag}: ${path} is empty; what was to write it may have failed`);
}

/** @throws ToolstackError `usage` */
export function readJsonFile(flag: string, path: string): unknown {
  try {
    return JSON.parse(readGivenFile(flag, path));
  } catch (cause) {
    if (cause instanceof ToolstackError) throw cause;
    throw new ToolstackError('usage', `${flag}: ${path} is not JSON`, { cause });
  }
}

/** A private key in PEM, not encrypted. @param passphraseFile where the file is @throws ToolstackError `usage` */
export function readPrivateKey(path: string, passphraseFile: string | undefined): string {
  const pem = readGivenFile('--key', path);
  const passphrase =
    passphraseFile === undefined
      ? undefined
      : withoutLineEnd(readGivenFile('--passphrase-file', passphraseFile));
  try {
    const key = createPrivateKey({ key: pem, ...(passphrase !== undefined && { passphrase }) });
    return key.export({ type: 'pkcs8', format: 'pem' }) as string;
  } catch (cause) {
    throw new ToolstackError(
      'usage',
      `--key: ${path} is no private key in PEM that can be read${passphrase === undefined ? '; one with a passphrase needs --passphrase-file' : ' with this passphrase'}`,
      { cause },
    );
  }
}

/** A password as the manager takes it, in hex. @throws ToolstackError `usage` */
export function readOwnerAuth(path: string | undefined): string | undefined {
  if (path === undefined) return undefined;
  return Buffer.from(withoutLineEnd(readGivenFile('--owner-auth-file', path))).toString('hex');
}

function withoutLineEnd(text: string): string {
  return text.replace(/\n$/, '');
}

/** A file that is made before what it is to hold is known: a key that is shown once must not fail to be kept. */
export interface SecretFile {
  write(text: string): void;
  /** Where there is nothing to keep. */
  discard(): void;
}

/** @throws ToolstackError `usage` where it is there already or cannot be made */
export function reserveSecretFile(flag: string, path: string): SecretFile {
  let fd: number;
  try {
    fd = openSync(path, 'wx', 0o600);
  } catch (cause) {
    const isThere = (cause as NodeJS.ErrnoException).code === 'EEXIST';
    throw new ToolstackError(
      'usage',
      `${flag}: ${isThere ? `${path} exists, and is not overwritten` : (cause as Error).message}`,
      { cause },
    );
  }
  return {
    write: (text) => {
      writeSync(fd, `${text}\n`);
      fsyncSync(fd);
      closeSync(fd);
      syncDirectory(dirname(path));
    },
    discard: () => {
      closeSync(fd);
      rmSync(path, { force: true });
    },
  };
}
