import { existsSync, rmSync } from 'node:fs';
import { type FileHandle, open, rename } from 'node:fs/promises';
import { dirname, resolve } from 'node:path';
import { barrier, syncDirectory } from 'vtpm-common';
import { ManagerError } from '../error.js';
import { AdminClient } from './admin-client.js';
import { damaged } from './format.js';
import { backupPublicText } from './operator-key.js';
import { readBackup } from './read.js';

export interface BackupToFile {
  readonly adminSocket: string;
  readonly output: string;
  /** X25519 public key, 32 bytes. */
  readonly recipient: Uint8Array;
  /** All where absent. */
  readonly vtpms: readonly string[] | undefined;
}

export interface BackupResult {
  readonly file: string;
  readonly backup: string;
  readonly vtpms: number;
  readonly bytes: number;
}

/**
 * Has the running manager make a backup. The file has its name only when all of it is on the disk and was read again and
 * verified: whatever ends this earlier leaves `.partial`, or nothing.
 * @throws ManagerError `store-full`, and the manager's
 */
export async function backupToFile(options: BackupToFile): Promise<BackupResult> {
  const output = resolve(options.output);
  if (existsSync(output)) {
    throw new ManagerError(
      'bad-request',
      `${output} exists; name another file, no backup is written over another`,
    );
  }
  const partial = `${output}.partial`;
  const client = new AdminClient(options.adminSocket);
  try {
    const { vtpms, recipient } = options;
    const body = Buffer.from(JSON.stringify({ to: backupPublicText(recipient), ...(vtpms && { vtpms }) }));
    const bytes = await client.stream('POST', '/backup', body);
    rmSync(partial, { force: true });
    const file = await open(partial, 'wx', 0o600);
    const size = await write(file, bytes).finally(() => file.close());
    const { header, statement } = await readBackup(partial, () => undefined);
    barrier('backup.verified');
    await rename(partial, output);
    syncDirectory(dirname(output));
    return {
      file: output,
      backup: Buffer.from(header.backupId).toString('hex'),
      vtpms: statement.count,
      bytes: size,
    };
  } catch (error) {
    rmSync(partial, { force: true });
    throw ManagerError.from(error, `the backup ${output} cannot be written`);
  } finally {
    client.close();
  }
}

/** Durable when it resolves. @returns bytes */
async function write(file: FileHandle, bytes: AsyncIterable<Buffer>): Promise<number> {
  let size = 0;
  try {
    for await (const chunk of bytes) {
      for (let at = 0; at < chunk.length; ) at += (await file.write(chunk, at)).bytesWritten;
      size += chunk.length;
      barrier('backup.chunk');
    }
  } catch (cause) {
    if ((cause as NodeJS.ErrnoException).code !== 'ECONNRESET') throw cause;
    throw damaged('the manager ended before it was whole; repeat it when the manager is back', cause);
  }
  await file.sync();
  return size;
}
