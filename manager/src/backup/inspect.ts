import { closeSync, existsSync, openSync, readFileSync, readSync, statSync } from 'node:fs';
import { join } from 'node:path';
import type { Logger } from 'vtpm-common';
import { bytesEqual, decode, ProtoError, type RecordHeader, uuidToText } from 'vtpm-proto';
import { ManagerError } from '../error.js';
import { KIND_NAMES, RECORD_FORMAT, savedBytes, vtpmOfKey } from '../records/index.js';
import {
  ANCHOR_KEY,
  buildMerkleTree,
  entriesOf,
  type LeafChange,
  MAX_VALUE_BYTES,
  type StoreEntry,
  statedUnverified,
  valueDigest,
  withLmdbStore,
} from '../store/index.js';
import { MAGIC } from './format.js';
import { backupPublicText } from './operator-key.js';
import { readBackup } from './read.js';

/** What a file or directory says of itself. Without a key nobody knows whether its maker was the manager. */
export interface Inspection {
  readonly what: 'backup' | 'store' | 'record';
  readonly path: string;
  readonly verdict: 'ok' | 'damaged';
  /** What is wrong. */
  readonly problems: readonly string[];
  readonly facts: Readonly<Record<string, string>>;
  readonly vtpms: readonly InspectedVtpm[];
}

export interface InspectedVtpm {
  readonly id: string;
  readonly vmUuid: string;
  readonly kind: string;
  readonly generation: bigint;
  readonly epoch: bigint;
  readonly bytes: number;
  readonly marks: readonly string[];
  readonly libtpmsVersion: string;
  /** Unix milliseconds. */
  readonly savedAt: bigint;
}

/** @throws ManagerError `bad-request` where it is none of ours, `in-use` for the store of a manager that runs */
export async function inspect(
  path: string,
  options: { readonly sandbox: boolean; readonly log: Logger },
): Promise<Inspection> {
  const stat = statSync(path, { throwIfNoEntry: false });
  if (!stat) throw new ManagerError('bad-request', `there is no ${path}`);
  if (stat.isDirectory()) return await inspectStore(path, options);
  return isBackup(path) ? await inspectBackup(path) : inspectRecord(path, stat.size);
}

function isBackup(path: string): boolean {
  const begin = Buffer.alloc(MAGIC.length);
  const fd = openSync(path, 'r');
  try {
    return readSync(fd, begin) === begin.length && begin.equals(MAGIC);
  } finally {
    closeSync(fd);
  }
}

async function inspectBackup(path: string): Promise<Inspection> {
  const vtpms: InspectedVtpm[] = [];
  let facts: Record<string, string> = {};
  const problems: string[] = [];
  try {
    const { header, statement } = await readBackup(path, (start, { parsed }) => {
      facts = factsOf(start.header);
      vtpms.push({ ...viewOf(parsed), bytes: parsed.size });
    });
    facts = { ...factsOf(header), finishedAt: time(statement.finishedAt), digest: hex(statement.digest) };
  } catch (error) {
    problems.push(sentenceOf(error));
  }
  return result('backup', path, problems, facts, vtpms);
}

function factsOf(header: Awaited<ReturnType<typeof readBackup>>['header']): Record<string, string> {
  return {
    backup: hex(header.backupId),
    manager: hex(header.managerId),
    store: hex(header.storeId),
    createdAt: time(header.createdAt),
    to: backupPublicText(header.recipient),
    signer: hex(header.signer),
    entries: String(header.count),
    anchorRoot: hex(header.anchorRoot),
    anchorCounter: String(header.anchorCounter),
    version: header.version,
  };
}

/** @param path of a store, of a manager's directory or of an installation's home */
async function inspectStore(
  path: string,
  { sandbox, log }: { readonly sandbox: boolean; readonly log: Logger },
): Promise<Inspection> {
  const directory = ['', 'store', 'manager/store']
    .map((below) => join(path, below))
    .find((candidate) => existsSync(join(candidate, 'data.mdb')));
  if (!directory) throw new ManagerError('bad-request', `there is no store in ${path}`);
  const vtpms: InspectedVtpm[] = [];
  const problems: string[] = [];
  const leaves: LeafChange[] = [];
  let facts: Record<string, string> = { anchor: 'missing' };
  let root: Uint8Array | undefined;
  const take = ({ key, version, value }: StoreEntry): void => {
    if (key === ANCHOR_KEY) {
      const stated = statedUnverified(value);
      root = stated.root;
      facts = {
        anchor: 'present',
        anchorRoot: hex(stated.root),
        anchorCounter: String(stated.counter),
        rootKeyGeneration: String(stated.keyId),
      };
      return;
    }
    leaves.push({ key, version, digest: valueDigest(value) });
    const id = vtpmOfKey(key);
    if (id !== undefined) vtpms.push(recordView(value, id));
  };
  await withLmdbStore({ directory, create: false, sandbox, log }, async (store) => {
    try {
      for await (const entry of entriesOf(store)) {
        try {
          take(entry);
        } catch (error) {
          problems.push(`${entry.key}: ${sentenceOf(error)}`);
        }
      }
    } catch (error) {
      problems.push(sentenceOf(error));
    }
  });
  if (!root) problems.push('it has no anchor that can be read: a start refuses it');
  else if (!bytesEqual(buildMerkleTree(leaves).root, root)) {
    problems.push('its records are not those that its anchor speaks of: a start refuses it');
  }
  return result('store', directory, problems, { ...facts, records: String(leaves.length) }, vtpms);
}

function inspectRecord(path: string, size: number): Inspection {
  if (size > MAX_VALUE_BYTES)
    throw new ManagerError('bad-request', `${path} is neither a backup nor a record`);
  const problems: string[] = [];
  const vtpms: InspectedVtpm[] = [];
  try {
    vtpms.push(recordView(readFileSync(path)));
  } catch (error) {
    problems.push(sentenceOf(error));
  }
  return result('record', path, problems, {}, vtpms);
}

/** @param id under which the record was kept */
function recordView(value: Uint8Array, id?: string): InspectedVtpm {
  const { header: bytes, parts } = decode('StoredRecord', value);
  const header: RecordHeader = decode('RecordHeader', bytes);
  if (header.format > RECORD_FORMAT) {
    throw new ManagerError(
      'newer-format',
      `it has format ${header.format}, this version reads ${RECORD_FORMAT}`,
    );
  }
  const sealed = parts.map((part) => decode('SealedPart', part));
  const view = { ...viewOf(header), bytes: savedBytes({ header, parts: sealed }) };
  if (id !== undefined && view.id !== id) {
    throw new ManagerError('store-corrupt', `it is the record of vTPM ${view.id}`);
  }
  return view;
}

function viewOf(
  facts: Pick<
    RecordHeader,
    'vtpmUuid' | 'vmUuid' | 'kind' | 'generation' | 'epoch' | 'marks' | 'libtpmsVersion' | 'savedAt'
  >,
): Omit<InspectedVtpm, 'bytes'> {
  const { kind, generation, epoch, marks, libtpmsVersion, savedAt } = facts;
  return {
    id: uuidToText(facts.vtpmUuid),
    vmUuid: uuidToText(facts.vmUuid),
    kind: KIND_NAMES[kind],
    generation,
    epoch,
    marks,
    libtpmsVersion,
    savedAt,
  };
}

function result(
  what: Inspection['what'],
  path: string,
  problems: readonly string[],
  facts: Readonly<Record<string, string>>,
  vtpms: readonly InspectedVtpm[],
): Inspection {
  return { what, path, verdict: problems.length === 0 ? 'ok' : 'damaged', problems, facts, vtpms };
}

function sentenceOf(error: unknown): string {
  if (error instanceof ManagerError) return `${error.message} (${error.code})`;
  if (error instanceof ProtoError) return `it is not readable: ${error.message}`;
  throw error;
}

function hex(bytes: Uint8Array): string {
  return Buffer.from(bytes).toString('hex');
}

function time(milliseconds: bigint): string {
  return new Date(Number(milliseconds)).toISOString();
}
