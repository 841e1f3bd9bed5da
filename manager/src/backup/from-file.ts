import { barrier } from 'vtpm-common';
import { encode, uuidToText } from 'vtpm-proto';
import { ManagerError } from '../error.js';
import { wipe } from '../keys/index.js';
import { AdminClient } from './admin-client.js';
import { Parallel } from './parallel.js';
import { type BackupStart, checkRecipient, openEntry, type ReadEntry, readBackup } from './read.js';

export interface RestoreFromFile {
  readonly adminSocket: string;
  readonly file: string;
  /** 32 bytes; wiped. */
  readonly secretKey: Buffer;
  /** All where absent. */
  readonly vtpms: readonly string[] | undefined;
  /** Without it nothing is changed. */
  readonly acceptRollback: boolean;
}

/** Of one vTPM: what the manager did or would do, or why it refused. */
export interface RestoredVtpm {
  readonly id: string;
  readonly action: 'restore' | 'retire' | 'nothing' | 'refused';
  readonly from?: number | null;
  readonly to?: number;
  readonly next?: number | null;
  readonly savedAt?: number;
  readonly reason?: { readonly code: string; readonly message: string };
}

export interface RestoreResult {
  readonly isDone: boolean;
  readonly vtpms: readonly RestoredVtpm[];
}

/** At a time; those that come together share a commit and a step of the TPM's counter. */
const PARALLEL = 16;

/**
 * Restores from a backup through the running manager. The operator's key stays in this process: the manager gets the
 * states that it is to keep, and nothing that opens another backup. The whole file is verified before the first is sent.
 * @throws ManagerError `bad-request`, `wrong-manager`, `unknown-vtpm` where the backup does not have one that was named
 */
export async function restoreFromFile(options: RestoreFromFile): Promise<RestoreResult> {
  const { secretKey, file, acceptRollback } = options;
  const client = new AdminClient(options.adminSocket, PARALLEL);
  const wanted = options.vtpms && new Set(options.vtpms);
  const isWanted = ({ parsed }: ReadEntry): boolean => !wanted || wanted.has(uuidToText(parsed.vtpmUuid));
  const results: RestoredVtpm[] = [];
  const running = new Parallel(PARALLEL);
  try {
    const missing = new Set(wanted);
    const { header } = await readBackup(
      file,
      (_, { parsed }) => void missing.delete(uuidToText(parsed.vtpmUuid)),
    );
    checkRecipient(header, secretKey);
    const [absent] = missing;
    if (absent !== undefined) throw new ManagerError('unknown-vtpm', `the backup has no vTPM ${absent}`);
    await checkManager(client, Buffer.from(header.managerId).toString('hex'));
    await readBackup(file, async (start, entry) => {
      if (!isWanted(entry)) return;
      const one = restoreOne(client, secretKey, start, entry, acceptRollback);
      await running.add(one.then((result) => results.push(result)));
      barrier('restore.entry');
    });
    await running.done();
    results.sort((a, b) => (a.id < b.id ? -1 : 1));
    return { isDone: acceptRollback, vtpms: results };
  } finally {
    await running.settled();
    wipe(secretKey);
    client.close();
  }
}

async function checkManager(client: AdminClient, madeBy: string): Promise<void> {
  const { managerId } = await client.json('GET', '/health');
  if (managerId === madeBy) return;
  throw new ManagerError(
    'wrong-manager',
    `this backup is of manager ${madeBy}, here runs ${String(managerId)}. It goes back to the installation that made it: ` +
      'where its disk is lost, vtpmctl rebuild makes it again from the backup',
  );
}

/** What one of them is refused for does not stop the others. */
async function restoreOne(
  client: AdminClient,
  secretKey: Uint8Array,
  start: BackupStart,
  entry: ReadEntry,
  acceptRollback: boolean,
): Promise<RestoredVtpm> {
  const { facts, signature, envelope } = entry;
  const content = acceptRollback && envelope.length > 0 ? openEntry(secretKey, start, entry) : undefined;
  const body = encode('RestoreRequest', {
    headerDigest: start.digest,
    facts,
    signature,
    ...(content && { content }),
  });
  try {
    const path = `/restore${acceptRollback ? '?accept-rollback=yes' : ''}`;
    return (await client.json('POST', path, body)) as unknown as RestoredVtpm;
  } catch (error) {
    if (!(error instanceof ManagerError) || !REFUSALS.has(error.code)) throw error;
    const { code, message } = error;
    return { id: uuidToText(entry.parsed.vtpmUuid), action: 'refused', reason: { code, message } };
  } finally {
    wipe(content, body);
  }
}

/** Of one vTPM alone. */
const REFUSALS: ReadonlySet<string> = new Set(['busy', 'retired', 'moved', 'migrating']);
