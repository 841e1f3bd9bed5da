import { encode, type SignedFencing, uuidToText, verifyFencing } from 'vtpm-proto';
import { AdminClient } from '../backup/admin-client.js';
import { type BackupStart, checkRecipient, openEntry, type ReadEntry, readBackup } from '../backup/read.js';
import { ManagerError } from '../error.js';
import { wipe } from '../keys/index.js';

export interface RescueFromFile {
  readonly adminSocket: string;
  /** A backup that the host made which is dead. */
  readonly file: string;
  /** 32 bytes; wiped. */
  readonly secretKey: Buffer;
  readonly fencing: SignedFencing;
  /** Without it nothing is changed. */
  readonly acceptRollback: boolean;
}

/** What the manager did or would do. Generations and times stay below 2^53. */
export interface RescueResult {
  readonly isDone: boolean;
  readonly id: string;
  readonly vmUuid: string;
  /** Name of the peer that is dead. */
  readonly from: string;
  readonly generation: number;
  readonly lastGeneration: number;
  readonly savedAt: number;
  /** With which it goes on, once it is done. */
  readonly next: number | null;
  readonly epoch: number | null;
}

/**
 * Rescues the vTPM of the statement from a backup, through the running manager. The whole file is verified first; the
 * operator's key stays in this process.
 * @throws ManagerError `unknown-vtpm` where the backup does not have it, `bad-request`, those of the manager
 */
export async function rescueFromFile(options: RescueFromFile): Promise<RescueResult> {
  const { file, secretKey, fencing, acceptRollback } = options;
  const client = new AdminClient(options.adminSocket);
  try {
    const id = uuidToText(verifyFencing(fencing).vtpmUuid);
    const { start, entry } = await findEntry(file, id);
    checkRecipient(start.header, secretKey);
    const { facts, signature, envelope } = entry;
    const content = acceptRollback && envelope.length > 0 ? openEntry(secretKey, start, entry) : undefined;
    const body = encode('RescueRequest', {
      restore: { headerDigest: start.digest, facts, signature, ...(content && { content }) },
      fencing,
    });
    try {
      const path = `/rescue${acceptRollback ? '?accept-rollback=yes' : ''}`;
      return (await client.json('POST', path, body)) as unknown as RescueResult;
    } finally {
      wipe(content, body);
    }
  } finally {
    wipe(secretKey);
    client.close();
  }
}

/** Of a backup that is whole. */
async function findEntry(
  file: string,
  id: string,
): Promise<{ readonly start: BackupStart; readonly entry: ReadEntry }> {
  let entry: ReadEntry | undefined;
  const start = await readBackup(file, (_, one) => {
    if (uuidToText(one.parsed.vtpmUuid) === id) entry = one;
  });
  if (entry) return { start, entry };
  throw new ManagerError('unknown-vtpm', `the backup has no vTPM ${id}; the statement is about another one`);
}
